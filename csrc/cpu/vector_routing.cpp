// vector_routing on a CPU: tiles of input rows that stay in cache, matrix products through torch, row mathematics in
// vector_routing_rows.h. The contract is fastroute/reference/step.py; the derivation, docs/vector_routing.md.
//
// Rows are divided into a number of pieces that depends on the shape only. Pieces run in parallel, each with sums of its
// own, and the sums are added in order at the end: the same input gives the same bits on any number of threads.
//
// Axes: B batch, n inputs, m outputs, d width of an input. A tile's block holds, per row, groups of m columns:
// forward [L, later phi | use | ign] (first iteration: [use | ign], phi apart), backward [<x, dM>, later phi | L, later dL | use | ign]; betas only when linear in x.

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/gemm.h"

namespace fastroute {
namespace {

using BFloat16 = torch::headeronly::BFloat16;
using OptionalTensor = std::optional<Tensor>;

// One tile's arrays, as the row functions see them. A stride of 0 gives every row the same parameters.
template <class T>
struct Rows {
  int64_t rows, m, ld, phi_ld;
  T *phi, *L;
  const T *use, *ign;
  int64_t beta_stride, ign_stride;
  const T *w, *b;
  int64_t score_stride;
  const T* prior;
  const uint8_t* mask;
  int64_t mask_row, mask_col;
  const T* gate;
  T* scratch;  // 3 m
  T* p;
  const T* dp;
  T* dgate;
  bool add_dgate;
  T *duse, *dign;
  int64_t dbeta_stride, dign_stride;
  T *duse_bias, *dign_bias;
  T *dw, *db;
  int64_t dscore_stride;
};

template <class T>
struct Functions {
  using Row = void (*)(const Rows<T>&);
  Row forward[2][2];      // [first iteration][masked]
  Row backward[2][2][3];  // [first iteration][masked][sink]
  void (*add_to)(T*, const T*, int64_t);
  void (*make_gates)(T*, const T*, int64_t, const T*, int64_t, const T*, int64_t, T, int64_t, int64_t);
  void (*gate_gradients)(
      const T*, const T*, const T*, int64_t, const T*, int64_t, T, T*, int64_t, T*, int64_t, T*, int64_t, int64_t,
      int64_t);
};

namespace baseline {
#include "vector_routing_rows.h"
}

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTROUTE_MULTIVERSION 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "vector_routing_rows.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#include "vector_routing_rows.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

template <class T>
const Functions<T>& rows() {
  static const Functions<T> chosen = [] {
#ifdef FASTROUTE_MULTIVERSION
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return avx512::functions<T>();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return avx2::functions<T>();
    }
#endif
    return baseline::functions<T>();
  }();
  return chosen;
}

// ------------------------------------------------------------------------------------------------- inputs and buffers

template <class T>
T* pointer(const OptionalTensor& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

template <class T, class S>
void convert(T* to, const S* from, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    to[k] = static_cast<T>(from[k]);
  }
}

// A parameter with a row per input, or one row for all (stride 0), of storage type S.
template <class S>
struct Parameter {
  S* data = nullptr;
  int64_t stride = 0;
};

template <class S>
Parameter<S> parameter(const OptionalTensor& t) {
  if (!t.has_value()) {
    return {};
  }
  const int64_t width = t->dim() > 1 ? t->size(1) : 1;
  return {static_cast<S*>(t->data_ptr()), t->size(0) == 1 ? 0 : width};
}

struct Inputs {
  const Tensor& x;
  const OptionalTensor &gate, &gate_weight, &gate_bias, &scale, &pred, &score_weight, &score_bias;
  const Tensor& use;
  const OptionalTensor &ign, &use_bias, &ign_bias, &prior, &mask, &lengths;
};

// What both passes read, resolved to pointers; T is the dtype of sums, X of x, P of parameters with a row per input.
template <class T, class X, class P>
struct Problem {
  int64_t B, n, m, d;
  const X* x;
  int64_t x_batch, x_row;
  bool first, linear, has_ign, makes_gates;
  const T *scale, *pred, *prior, *use_bias, *ign_bias, *use_weight, *ign_weight;
  Parameter<P> gate_weight, gate_bias, score_weight, score_bias, use, ign;
  const uint8_t* mask;
  int64_t mask_batch, mask_row, mask_col;
  const int64_t* lengths;

  explicit Problem(const Inputs& in)
      : B(in.x.size(0)), n(in.x.size(1)), d(in.x.size(2)), x(static_cast<const X*>(in.x.data_ptr())),
        x_batch(in.x.stride(0)), x_row(in.x.stride(1)), first(!in.pred.has_value()), linear(in.use_bias.has_value()),
        has_ign(in.ign.has_value()), makes_gates(in.gate_weight.has_value()), scale(pointer<T>(in.scale)),
        pred(pointer<T>(in.pred)), prior(pointer<T>(in.prior)), use_bias(pointer<T>(in.use_bias)),
        ign_bias(pointer<T>(in.ign_bias)), gate_weight(parameter<P>(in.gate_weight)),
        gate_bias(parameter<P>(in.gate_bias)), score_weight(parameter<P>(in.score_weight)),
        score_bias(parameter<P>(in.score_bias)), mask(pointer<uint8_t>(in.mask)),
        mask_batch(mask != nullptr ? in.mask->stride(0) : 0), mask_row(mask != nullptr ? in.mask->stride(1) : 0),
        mask_col(mask != nullptr ? in.mask->stride(2) : 0), lengths(pointer<int64_t>(in.lengths)) {
    m = linear ? in.use.size(0) : in.use.size(1);
    use_weight = linear ? static_cast<const T*>(in.use.data_ptr()) : nullptr;
    ign_weight = linear && has_ign ? static_cast<const T*>(in.ign->data_ptr()) : nullptr;
    if (!linear) {
      use = {static_cast<P*>(in.use.data_ptr()), m};
      ign = parameter<P>(in.ign);
      ign.stride = has_ign ? m : 0;
    }
    if (first) {
      score_weight = score_bias = {};
    }
  }

  int64_t live(int64_t b, int64_t start, int64_t stop) const {
    return std::clamp<int64_t>((lengths == nullptr ? n : lengths[b]) - start, 0, stop - start);
  }
};

// How rows are divided: by shape only.
struct Division {
  int64_t pieces, rows, tile;  // rows a piece, rows a tile

  Division(int64_t B, int64_t n, int64_t m, int64_t d, int64_t groups, size_t itemsize) {
    const int64_t sums = B * m * d;
    pieces = std::clamp<int64_t>(n * std::min<int64_t>(B, 8) / 256, 1, 8);
    pieces = std::min(pieces, std::max<int64_t>(2, (int64_t{1} << 22) / sums));
    rows = std::max<int64_t>((n + pieces - 1) / pieces, std::min<int64_t>(n, 16));
    pieces = (n + rows - 1) / rows;
    const int64_t fits = (int64_t{3} << 19) / static_cast<int64_t>(itemsize) / (d + groups * m) / 16 * 16;
    const int64_t most = std::clamp<int64_t>(fits, 384, 2048);
    const int64_t tiles = (rows + most - 1) / most;
    tile = (rows + tiles - 1) / tiles;
  }
};

template <class T>
struct Buffer {
  std::unique_ptr<T[]> data;
  Buffer() = default;
  explicit Buffer(int64_t count) : data(new T[count]) {}
  Buffer(int64_t count, T value) : Buffer(count) { std::fill_n(data.get(), count, value); }
  operator T*() const { return data.get(); }
};

// A tile of a parameter in the dtype of sums: the parameter itself where it is that already.
template <class T, class P>
class Loaded {
 public:
  Loaded(const Parameter<P>& p, int64_t tile, int64_t width) : p_(p), width_(width) {
    if constexpr (!std::is_same_v<T, P>) {
      if (p.data != nullptr) {
        copy_ = Buffer<T>((p.stride == 0 ? 1 : tile) * width);
      }
    }
  }
  const T* rows(int64_t start, int64_t count) const {
    if (p_.data == nullptr) {
      return nullptr;
    }
    P* from = p_.data + start * p_.stride;
    if constexpr (std::is_same_v<T, P>) {
      return from;
    } else {
      convert(static_cast<T*>(copy_), from, (p_.stride == 0 ? 1 : count) * width_);
      return copy_;
    }
  }

 private:
  Parameter<P> p_;
  int64_t width_;
  Buffer<T> copy_;
};

template <class T, class X>
const T* load_x(const X* x, int64_t row_stride, int64_t rows, int64_t d, T* copy, int64_t* stride) {
  if constexpr (std::is_same_v<T, X>) {
    *stride = row_stride;
    return x;
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      convert(copy + i * d, x + i * row_stride, d);
    }
    *stride = d;
    return copy;
  }
}

// Products accumulated over tiles.
template <class T>
class Accumulated {
 public:
  Accumulated(T* data, int64_t count) : data_(data), count_(count) {}
  void add(const T* product) {
    if (begun_) {
      rows<T>().add_to(data_, product, count_);
    } else {
      std::copy_n(product, count_, data_);
      begun_ = true;
    }
  }
  void finish() {
    if (!begun_) {
      std::fill_n(data_, count_, T(0));
    }
  }

 private:
  T* data_;
  int64_t count_;
  bool begun_ = false;
};

// out = sum over pieces, in order.
template <class T>
void sum_pieces(T* out, const T* parts, int64_t pieces, int64_t count) {
  torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    std::copy(parts + begin, parts + end, out + begin);
    for (int64_t s = 1; s < pieces; ++s) {
      rows<T>().add_to(out + begin, parts + s * count + begin, end - begin);
    }
  });
}

template <class F>
void parallel_pieces(int64_t pieces, const F& f) {
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      f(s);
    }
  });
}

// The rows of a sample's product operand: [dM] [P] [use] [ign], those there are.
template <class T, class X, class P>
Buffer<T> operand(const Problem<T, X, P>& q, const T* dM, int64_t groups) {
  const int64_t block = q.m * q.d;
  Buffer<T> stack(q.B * groups * block);
  for (int64_t b = 0; b < q.B; ++b) {
    T* to = stack + b * groups * block;
    for (const T* from : {dM == nullptr ? nullptr : dM + b * block, q.first ? nullptr : q.pred + b * block,
                          q.use_weight, q.ign_weight}) {
      if (from != nullptr) {
        to = std::copy_n(from, block, to);
      }
    }
  }
  return stack;
}

template <class T, class X, class P>
void add_biases(const Problem<T, X, P>& q, T* use, T* ign, int64_t count, int64_t ld) {
  for (int64_t i = 0; i < count; ++i) {
    rows<T>().add_to(use + i * ld, q.use_bias, q.m);
    if (q.has_ign) {
      rows<T>().add_to(ign + i * ld, q.ign_bias, q.m);
    }
  }
}

// --------------------------------------------------------------------------------------------------------- forward

template <class T, class X, class P>
void forward(const Problem<T, X, P>& q, T* M, T* p, T* gate) {
  const int64_t B = q.B, n = q.n, m = q.m, d = q.d;
  const int64_t betas = q.linear ? 1 + q.has_ign : 0;
  const int64_t groups = 1 + betas, products = groups - q.first;
  const Division div(B, n, m, d, groups, sizeof(T));
  const Buffer<T> stack = products > 0 ? operand(q, static_cast<const T*>(nullptr), products) : Buffer<T>();
  Buffer<T> M_parts, p_parts(div.pieces * B * m, T(0));
  if (div.pieces > 1) {
    M_parts = Buffer<T>(div.pieces * B * m * d);
  }
  const Buffer<T> zeros(m, T(0));

  parallel_pieces(div.pieces, [&](int64_t s) {
    const int64_t ld = products * m, piece_stop = std::min((s + 1) * div.rows, n);
    Product<T> make_block, make_M;
    Buffer<T> own_phi(q.first ? div.tile * m : 0), scratch(3 * m), tile_p(m);
    Buffer<T> x_copy = std::is_same_v<T, X> ? Buffer<T>() : Buffer<T>(div.tile * d);
    const Loaded<T, P> gate_weight(q.gate_weight, div.tile, d), gate_bias(q.gate_bias, div.tile, 1);
    const Loaded<T, P> w(q.score_weight, div.tile, m), bias(q.score_bias, div.tile, m);
    const Loaded<T, P> use(q.use, div.tile, m), ign(q.ign, div.tile, m);
    T* M_piece = div.pieces > 1 ? M_parts + s * B * m * d : M;
    std::vector<Accumulated<T>> sums;
    for (int64_t b = 0; b < B; ++b) {
      sums.emplace_back(M_piece + b * m * d, m * d);
    }
    for (int64_t start = s * div.rows; start < piece_stop; start += div.tile) {
      const int64_t stop = std::min(start + div.tile, piece_stop), all = stop - start;
      const T *gate_weight_rows = gate_weight.rows(start, all), *gate_bias_rows = gate_bias.rows(start, all);
      Rows<T> a{};
      a.m = m;
      a.ld = ld;
      a.phi_ld = q.first ? m : ld;
      a.w = w.rows(start, all);
      a.b = bias.rows(start, all);
      a.score_stride = q.score_weight.stride;
      a.use = q.linear ? nullptr : use.rows(start, all);
      a.beta_stride = q.linear ? ld : m;
      a.ign = q.has_ign && !q.linear ? ign.rows(start, all) : static_cast<const T*>(zeros);
      a.ign_stride = !q.has_ign ? 0 : a.beta_stride;
      a.prior = q.prior;
      a.mask_row = q.mask_row;
      a.mask_col = q.mask_col;
      a.scratch = scratch;
      a.p = tile_p;
      for (int64_t b = 0; b < B; ++b) {
        const int64_t count = q.live(b, start, stop);
        T* f = gate + b * n + start;
        if (q.makes_gates) {
          std::fill(f + count, f + all, T(0));
        }
        if (count == 0) {
          continue;
        }
        int64_t x_stride;
        const T* x = load_x<T>(q.x + b * q.x_batch + start * q.x_row, q.x_row, count, d, x_copy, &x_stride);
        const Matrix<const T> x_rows(x, count, d, x_stride);
        if (q.makes_gates) {
          rows<T>().make_gates(f, x, x_stride, gate_weight_rows, q.gate_weight.stride, gate_bias_rows,
                               q.gate_bias.stride, q.scale[b], count, d);
        }
        a.phi = a.L = own_phi;
        if (products > 0) {
          T* block = make_block(x_rows, Matrix<const T>(stack + b * products * m * d, products * m, d, d).transposed());
          if (!q.first) {
            a.phi = a.L = block;
            block += m;
          }
          if (q.linear) {
            add_biases(q, block, block + m, count, ld);
            a.use = block;
            a.ign = q.has_ign ? block + m : static_cast<const T*>(zeros);
          }
        }
        a.rows = count;
        a.gate = f;
        a.mask = q.mask == nullptr ? nullptr : q.mask + b * q.mask_batch + start * q.mask_row;
        std::fill_n(static_cast<T*>(tile_p), m, T(0));
        rows<T>().forward[q.first][q.mask != nullptr](a);
        rows<T>().add_to(p_parts + (s * B + b) * m, tile_p, m);
        sums[b].add(make_M(Matrix<T>(a.phi, count, m, a.phi_ld).transposed(), x_rows));
      }
    }
    for (auto& sum : sums) {
      sum.finish();
    }
  });
  if (div.pieces > 1) {
    sum_pieces<T>(M, M_parts, div.pieces, B * m * d);
  }
  sum_pieces<T>(p, p_parts, div.pieces, B * m);
}

// -------------------------------------------------------------------------------------------------------- backward

template <class T, class X, class P>
struct Gradients {
  bool fresh, wants_rows;
  X* x;
  T* gate;
  Parameter<P> gate_weight, gate_bias, score_weight, score_bias, use, ign;  // a row per input
  // shared by all rows: sums over pieces are added to these
  T *shared_gate_weight, *shared_gate_bias, *shared_score_weight, *shared_score_bias;
  T *use_weight, *ign_weight, *use_bias, *ign_bias;
};

// A tile of a per-row gradient in the dtype of sums: the gradient itself where it is that already.
template <class T, class P>
class Stored {
 public:
  Stored(const Parameter<P>& p, int64_t tile, int64_t width, bool wanted) : p_(p), width_(width) {
    if (!std::is_same_v<T, P> || p.data == nullptr) {
      copy_ = Buffer<T>((wanted && p.data != nullptr ? tile : 1) * width, T(0));
    }
  }
  int64_t stride() const { return p_.data == nullptr ? 0 : width_; }
  T* rows(int64_t start, int64_t count, bool zero) const {
    if (p_.data == nullptr) {
      return copy_;
    }
    T* to;
    if constexpr (std::is_same_v<T, P>) {
      to = p_.data + start * width_;
    } else {
      to = copy_;
      zero = true;
    }
    if (zero) {
      std::fill_n(to, count * width_, T(0));
    }
    return to;
  }
  void store(int64_t start, int64_t count, bool fresh) const {
    if constexpr (!std::is_same_v<T, P>) {
      P* to = p_.data + start * width_;
      for (int64_t k = 0; p_.data != nullptr && k < count * width_; ++k) {
        to[k] = static_cast<P>(fresh ? copy_[k] : static_cast<T>(to[k]) + copy_[k]);
      }
    }
  }

 private:
  Parameter<P> p_;
  int64_t width_;
  Buffer<T> copy_;
};

template <class T, class X, class P>
void backward(const Problem<T, X, P>& q, const T* gate, const T* dM, const T* dp, T* dpred, const Gradients<T, X, P>& g) {
  const int64_t B = q.B, n = q.n, m = q.m, d = q.d;
  const int64_t betas = q.linear ? 1 + q.has_ign : 0;
  const int64_t groups = 1 + !q.first + betas;  // columns of a block, rows of the operand
  const int64_t reduced = groups - 1;           // of these, summed over rows: dP, and the betas' weights
  const Division div(B, n, m, d, groups, sizeof(T));
  const Buffer<T> stack = operand(q, dM, groups);
  // Sums of a piece: reduced products per sample; then shared rows.
  const int64_t products = B * reduced * m * d;
  const int64_t shared = 4 * m + (q.makes_gates && q.gate_weight.stride == 0 ? d + 1 : 0);
  const bool wants_products = reduced > 0 && (!q.first || g.wants_rows);
  Buffer<T> product_parts(wants_products ? div.pieces * products : 1), shared_parts(div.pieces * shared, T(0));
  const Buffer<T> zeros(m, T(0));
  const bool shared_scores = !q.first && q.score_weight.stride == 0;

  parallel_pieces(div.pieces, [&](int64_t s) {
    const int64_t ld = groups * m, piece_stop = std::min((s + 1) * div.rows, n);
    Product<T> make_block, make_sums, make_dx;
    Buffer<T> scratch(3 * m), dump(2 * m, T(0));
    Buffer<T> x_copy = std::is_same_v<T, X> ? Buffer<T>() : Buffer<T>(div.tile * d);
    const Loaded<T, P> gate_weight(q.gate_weight, div.tile, d);
    const Loaded<T, P> w(q.score_weight, div.tile, m), bias(q.score_bias, div.tile, m);
    const Loaded<T, P> use(q.use, div.tile, m), ign(q.ign, div.tile, m);
    const Stored<T, P> dgate_weight(g.gate_weight, div.tile, d, g.wants_rows);
    const Stored<T, P> dgate_bias(g.gate_bias, div.tile, 1, g.wants_rows);
    const Stored<T, P> dw(g.score_weight, div.tile, m, g.wants_rows), db(g.score_bias, div.tile, m, g.wants_rows);
    const Stored<T, P> duse(g.use, div.tile, m, g.wants_rows), dign(g.ign, div.tile, m, g.wants_rows);
    T* shared_piece = shared_parts + s * shared;
    T* shared_gate = shared_piece + 4 * m;
    std::vector<Accumulated<T>> sums;
    for (int64_t b = 0; b < B && wants_products; ++b) {
      sums.emplace_back(product_parts + s * products + b * reduced * m * d, reduced * m * d);
    }
    for (int64_t start = s * div.rows; start < piece_stop; start += div.tile) {
      const int64_t stop = std::min(start + div.tile, piece_stop), all = stop - start;
      // Without padding the first sample writes the tile's parameter gradients; with it, some rows may have no writer.
      const bool first_writes = std::is_same_v<T, P> && g.fresh && q.lengths == nullptr;
      const bool zero = g.fresh && !first_writes;
      const T* gate_weight_rows = gate_weight.rows(start, all);
      T* dgate_weight_rows = g.wants_rows ? dgate_weight.rows(start, all, true) : nullptr;
      T* dgate_bias_rows = dgate_bias.rows(start, all, true);
      Rows<T> a{};
      a.m = m;
      a.ld = ld;
      a.phi_ld = ld;
      a.w = w.rows(start, all);
      a.b = bias.rows(start, all);
      a.score_stride = q.score_weight.stride;
      a.use = use.rows(start, all);
      a.beta_stride = q.linear ? ld : m;
      a.ign = q.has_ign && !q.linear ? ign.rows(start, all) : static_cast<const T*>(zeros);
      a.ign_stride = !q.has_ign ? 0 : a.beta_stride;
      a.prior = q.prior;
      a.mask_row = q.mask_row;
      a.mask_col = q.mask_col;
      a.scratch = scratch;
      a.add_dgate = !g.fresh;
      a.duse = duse.rows(start, all, zero);
      a.dbeta_stride = q.linear ? ld : duse.stride();
      a.dign = q.has_ign && !q.linear ? dign.rows(start, all, zero) : static_cast<T*>(dump);
      a.dign_stride = !q.has_ign ? 0 : q.linear ? ld : dign.stride();
      a.duse_bias = shared_piece;
      a.dign_bias = shared_piece + m;
      a.dw = shared_scores ? shared_piece + 2 * m : dw.rows(start, all, zero);
      a.db = shared_scores ? shared_piece + 3 * m : db.rows(start, all, zero);
      a.dscore_stride = shared_scores ? 0 : dw.stride();
      if (q.first && g.fresh && !q.linear) {  // a single iteration: the scores' gradients are zero
        dw.rows(start, all, true);
        db.rows(start, all, true);
      }
      for (int64_t b = 0; b < B; ++b) {
        const int64_t count = q.live(b, start, stop);
        T* df = g.gate + b * n + start;
        X* dx_rows = g.x == nullptr ? nullptr : g.x + (b * n + start) * d;
        if (g.fresh) {
          std::fill(df + count, df + all, T(0));
          if (dx_rows != nullptr) {
            std::fill(dx_rows + count * d, dx_rows + all * d, X(0.0f));
          }
        }
        if (count == 0) {
          continue;
        }
        int64_t x_stride;
        const T* x = load_x<T>(q.x + b * q.x_batch + start * q.x_row, q.x_row, count, d, x_copy, &x_stride);
        const Matrix<const T> x_rows(x, count, d, x_stride);
        const Matrix<const T> operand_rows(stack + b * groups * m * d, groups * m, d, d);
        T* block = make_block(x_rows, operand_rows.transposed());
        a.phi = block;
        a.L = block + m;
        if (q.linear) {
          T* use_block = block + (1 + !q.first) * m;
          add_biases(q, use_block, use_block + m, count, ld);
          a.use = a.duse = use_block;
          if (q.has_ign) {
            a.ign = a.dign = use_block + m;
          }
        }
        a.rows = count;
        a.gate = gate + b * n + start;
        a.mask = q.mask == nullptr ? nullptr : q.mask + b * q.mask_batch + start * q.mask_row;
        a.dp = dp + b * m;
        a.dgate = df;
        const int sink = q.linear ? 2 : (first_writes && b == 0) || !g.wants_rows ? 0 : 1;
        rows<T>().backward[q.first][q.mask != nullptr][sink](a);
        if (wants_products) {
          sums[b].add(make_sums(Matrix<T>(block + m, count, reduced * m, ld).transposed(), x_rows));
        }
        T* dx = dx_rows == nullptr ? nullptr : make_dx(Matrix<T>(block, count, ld, ld), operand_rows);
        if (q.makes_gates) {
          const bool one = q.gate_weight.stride == 0;
          rows<T>().gate_gradients(
              df, a.gate, x, x_stride, gate_weight_rows, q.gate_weight.stride, q.scale[b],
              !g.wants_rows ? nullptr : one ? shared_gate : dgate_weight_rows, one ? 0 : d,
              one ? shared_gate + d : dgate_bias_rows, one ? 0 : 1, dx, d, count, d);
        }
        if (dx != nullptr) {
          if constexpr (!std::is_same_v<T, X>) {
            for (int64_t k = 0; k < count * d; ++k) {
              dx_rows[k] = static_cast<X>(g.fresh ? dx[k] : static_cast<T>(dx_rows[k]) + dx[k]);
            }
          } else if (g.fresh) {
            std::copy_n(dx, count * d, dx_rows);
          } else {
            rows<T>().add_to(dx_rows, dx, count * d);
          }
        }
      }
      dgate_weight.store(start, all, true);
      dgate_bias.store(start, all, true);
      dw.store(start, all, g.fresh);
      db.store(start, all, g.fresh);
      duse.store(start, all, g.fresh);
      dign.store(start, all, g.fresh);
    }
    for (auto& sum : sums) {
      sum.finish();
    }
  });

  Buffer<T> total(std::max(products, shared));
  if (wants_products) {
    sum_pieces<T>(total, product_parts, div.pieces, products);
    const int64_t block = m * d;
    for (int64_t b = 0; b < B; ++b) {
      const T* from = total + b * reduced * block;
      if (!q.first) {
        std::copy_n(from, block, dpred + b * block);
        from += block;
      }
      for (T* to : {g.use_weight, g.ign_weight}) {
        if (to != nullptr) {
          if (g.fresh && b == 0) {
            std::copy_n(from, block, to);
          } else {
            rows<T>().add_to(to, from, block);
          }
        }
        from += block;
      }
    }
  }
  if (!g.wants_rows) {
    return;
  }
  sum_pieces<T>(total, shared_parts, div.pieces, shared);
  T* shared_rows[] = {g.use_bias, g.ign_bias, g.shared_score_weight, g.shared_score_bias};
  for (int k = 0; k < 4; ++k) {
    if (shared_rows[k] != nullptr) {
      if (g.fresh) {
        std::copy_n(total + k * m, m, shared_rows[k]);
      } else {
        rows<T>().add_to(shared_rows[k], total + k * m, m);
      }
    }
  }
  if (g.shared_gate_weight != nullptr) {
    std::copy_n(total + 4 * m, d, g.shared_gate_weight);
    *g.shared_gate_bias = total[4 * m + d];
  }
}

// ------------------------------------------------------------------------------------------------- registration

using torch::headeronly::ScalarType;

// Calls f with (sums, x, per-row parameters) as types.
template <class F>
void with_types(ScalarType x, ScalarType parameters, const F& f) {
  if (x == ScalarType::Double) {
    f(double(), double(), double());
  } else if (x == ScalarType::Float) {
    f(float(), float(), float());
  } else if (parameters == ScalarType::Float) {
    f(float(), BFloat16(0.0f), float());
  } else {
    f(float(), BFloat16(0.0f), BFloat16(0.0f));
  }
}

ScalarType parameter_type(const Inputs& in) {
  return in.use_bias.has_value() ? (in.x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float)
                                 : in.use.scalar_type();
}

std::tuple<Tensor, Tensor, Tensor> forward_op(
    Tensor x, OptionalTensor gate, OptionalTensor gate_weight, OptionalTensor gate_bias, OptionalTensor scale,
    OptionalTensor pred, OptionalTensor score_weight, OptionalTensor score_bias, Tensor use, OptionalTensor ign,
    OptionalTensor use_bias, OptionalTensor ign_bias, OptionalTensor prior, OptionalTensor mask,
    OptionalTensor lengths) {
  const Inputs in{x, gate, gate_weight, gate_bias, scale, pred, score_weight, score_bias, use, ign, use_bias, ign_bias,
                  prior, mask, lengths};
  Tensor M, p, made;
  with_types(x.scalar_type(), parameter_type(in), [&](auto t, auto x_type, auto p_type) {
    using T = decltype(t);
    const Problem<T, decltype(x_type), decltype(p_type)> q(in);
    constexpr auto type = scalar_type_of<T>();
    M = torch::stable::new_empty(x, {q.B, q.m, q.d}, type);
    p = torch::stable::new_empty(x, {q.B, q.m}, type);
    made = gate.has_value() ? *gate : torch::stable::new_empty(x, {q.B, q.n}, type);
    forward(q, static_cast<T*>(M.data_ptr()), static_cast<T*>(p.data_ptr()), static_cast<T*>(made.data_ptr()));
  });
  if (gate.has_value()) {
    made = torch::stable::new_empty(x, {0}, M.scalar_type());  // an op may not return its input
  }
  return {M, p, made};
}

Tensor backward_op(
    Tensor x, Tensor gate, OptionalTensor gate_weight, OptionalTensor gate_bias, OptionalTensor scale,
    OptionalTensor pred, OptionalTensor score_weight, OptionalTensor score_bias, Tensor use, OptionalTensor ign,
    OptionalTensor use_bias, OptionalTensor ign_bias, OptionalTensor prior, OptionalTensor mask, OptionalTensor lengths,
    Tensor dM, Tensor dp, bool fresh, Tensor dgate, OptionalTensor dx, OptionalTensor dgate_weight,
    OptionalTensor dgate_bias, OptionalTensor dscore_weight, OptionalTensor dscore_bias, OptionalTensor duse,
    OptionalTensor dign, OptionalTensor duse_bias, OptionalTensor dign_bias) {
  const OptionalTensor optional_gate(gate);
  const Inputs in{x, optional_gate, gate_weight, gate_bias, scale, pred, score_weight, score_bias, use, ign, use_bias,
                  ign_bias, prior, mask, lengths};
  Tensor dpred;
  with_types(x.scalar_type(), parameter_type(in), [&](auto t, auto x_type, auto p_type) {
    using T = decltype(t);
    using X = decltype(x_type);
    using P = decltype(p_type);
    const Problem<T, X, P> q(in);
    dpred = torch::stable::new_empty(x, {q.first ? 0 : q.B, q.m, q.d}, scalar_type_of<T>());
    Gradients<T, X, P> g{};
    g.fresh = fresh;
    g.wants_rows = duse.has_value();
    g.x = pointer<X>(dx);
    g.gate = static_cast<T*>(dgate.data_ptr());
    if (q.linear) {
      g.shared_gate_weight = pointer<T>(dgate_weight);
      g.shared_gate_bias = pointer<T>(dgate_bias);
      g.shared_score_weight = pointer<T>(dscore_weight);
      g.shared_score_bias = pointer<T>(dscore_bias);
      g.use_weight = pointer<T>(duse);
      g.ign_weight = pointer<T>(dign);
      g.use_bias = pointer<T>(duse_bias);
      g.ign_bias = pointer<T>(dign_bias);
    } else {
      g.gate_weight = {pointer<P>(dgate_weight), q.d};
      g.gate_bias = {pointer<P>(dgate_bias), 1};
      g.score_weight = {pointer<P>(dscore_weight), q.m};
      g.score_bias = {pointer<P>(dscore_bias), q.m};
      g.use = {pointer<P>(duse), q.m};
      g.ign = {pointer<P>(dign), q.m};
    }
    backward(q, static_cast<const T*>(gate.data_ptr()), static_cast<const T*>(dM.data_ptr()),
             static_cast<const T*>(dp.data_ptr()), static_cast<T*>(dpred.data_ptr()), g);
  });
  return dpred;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_vector_routing_native", TORCH_BOX(&forward_op));
  library.impl("_vector_routing_native_backward", TORCH_BOX(&backward_op));
}

}  // namespace fastroute

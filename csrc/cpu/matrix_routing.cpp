// matrix_routing on a CPU: one pass over tiles of inputs, whose votes are made, weighed and forgotten in cache. Row
// mathematics is in matrix_routing_rows.inc, axes and the layout of what a tile holds in matrix_routing.h.
//
// Work is divided into pieces by shape only. Pieces run in parallel, each with sums of its own in double, and the sums
// are put together in order: the same input gives the same bits on any number of threads.

#include "cpu/matrix_routing.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/empty.h"

namespace fastroute::matrix_routing {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using BFloat16 = torch::headeronly::BFloat16;

constexpr int64_t kVector = 16;  // outputs are padded to as many: 64 bytes of float

// Memory on a vector's boundary.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : data_(new (kAlign) T[count]) {}
  Buffer(int64_t count, T value) : Buffer(count) { std::fill_n(data_.get(), count, value); }
  operator T*() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete[](data, kAlign); }
  };
  std::unique_ptr<T[], Delete> data_;
};

template <class T>
T* pointer(const OptionalTensor& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// [B, m, k] as [B, k, p], and with `past` after m.
template <class T>
Buffer<T> turned(const OptionalTensor& t, const Sizes& s, int64_t k, T past = T(0)) {
  if (!t.has_value()) {
    return Buffer<T>();
  }
  Buffer<T> to(s.B * k * s.p);
  const T* from = static_cast<const T*>(t->data_ptr());
  for (int64_t b = 0; b < s.B; ++b) {
    rows<T>().turn(to + b * k * s.p, from + b * k * s.m, s.m, k, s.p);
    for (int64_t x = 0; x < k; ++x) {
      std::fill(to + (b * k + x) * s.p + s.m, to + (b * k + x + 1) * s.p, past);
    }
  }
  return to;
}

// [B, k, p] in double as a tensor [B, m, k], or [B, m] where shape is empty
template <class T>
Tensor as_tensor(const double* from, const Sizes& s, bool matrices) {
  constexpr ScalarType type = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
  Tensor made = matrices ? empty_cpu<4>({s.B, s.m, s.c, s.h}, type) : empty_cpu<2>({s.B, s.m}, type);
  T* to = static_cast<T*>(made.data_ptr());
  const int64_t k = matrices ? s.c * s.h : 1;
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t j = 0; j < s.m; ++j) {
      for (int64_t x = 0; x < k; ++x) {
        *to++ = static_cast<T>(from[(b * k + x) * s.p + j]);
      }
    }
  }
  return made;
}

struct Inputs {
  const Tensor &gate, &mu_inp, &W, &bias, &use, &ign;
  const OptionalTensor &mask, &prior, &mu, &weight;
};

// T is the dtype of sums, P that of parameters.
template <class T, class P>
struct Problem {
  Sizes s;
  bool shared;
  const T *gate, *mu_inp;
  const P *W, *bias, *use, *ign;
  const uint8_t* mask;
  int64_t mask_batch, mask_row, mask_col;
  Buffer<T> prior, mu, weight;  // [B, p], [B, c, h, p]
  bool first;

  explicit Problem(const Inputs& in)
      : s{in.mu_inp.size(0), in.mu_inp.size(1), in.W.size(1), in.mu_inp.size(2), in.mu_inp.size(3), in.W.size(3),
          (in.W.size(1) + kVector - 1) / kVector * kVector},
        shared(in.W.size(0) == 1), gate(static_cast<const T*>(in.gate.data_ptr())),
        mu_inp(static_cast<const T*>(in.mu_inp.data_ptr())), W(static_cast<const P*>(in.W.data_ptr())),
        bias(static_cast<const P*>(in.bias.data_ptr())), use(static_cast<const P*>(in.use.data_ptr())),
        ign(static_cast<const P*>(in.ign.data_ptr())), mask(pointer<uint8_t>(in.mask)),
        mask_batch(mask != nullptr ? in.mask->stride(0) : 0), mask_row(mask != nullptr ? in.mask->stride(1) : 0),
        mask_col(mask != nullptr ? in.mask->stride(2) : 0),
        prior(turned<T>(in.prior, s, 1, -std::numeric_limits<T>::infinity())), mu(turned<T>(in.mu, s, s.c * s.h)),
        weight(turned<T>(in.weight, s, s.c * s.h)), first(!in.prior.has_value()) {}

  Previous<T> previous(int64_t b) const {
    if (first) {
      return {nullptr, nullptr, nullptr};
    }
    return {prior + b * s.p, mu + b * s.votes(), weight + b * s.votes()};
  }
};

// How the work is divided, by shape only: row_pieces times sample_pieces, each over tiles of inputs.
struct Division {
  int64_t row_pieces, inputs, sample_pieces, samples, tile;

  Division(const Sizes& s, bool shared, bool gradients, size_t itemsize) {
    row_pieces = std::clamp<int64_t>(s.n / 64, 1, 8);
    if (shared) {  // samples first: their sums are their own
      sample_pieces = std::min<int64_t>(s.B, 8);
      row_pieces = std::min(row_pieces, std::max<int64_t>(1, 8 / sample_pieces));
    } else {  // parameters are turned again for each piece of samples, and their gradients summed over all
      sample_pieces = gradients ? 1 : std::clamp<int64_t>(s.B / 8, 1, 8 / row_pieces);
    }
    samples = (s.B + sample_pieces - 1) / sample_pieces;
    sample_pieces = (s.B + samples - 1) / samples;
    inputs = (s.n + row_pieces - 1) / row_pieces;
    row_pieces = (s.n + inputs - 1) / inputs;
    const bool heavy = shared && s.weights() > 4 * s.votes();
    const int64_t cache = (heavy ? int64_t{1} << 19 : int64_t{1} << 16) / static_cast<int64_t>(itemsize);
    tile = std::min(inputs, std::clamp<int64_t>(cache / s.votes(), 4, 64));
  }
  int64_t pieces() const { return row_pieces * sample_pieces; }
  // f(row piece, its inputs' begin and end, its samples' begin and end)
  template <class F>
  void parallel(const Sizes& s, const F& f) const {
    torch::stable::parallel_for(0, pieces(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t r = k / sample_pieces, q = k % sample_pieces;
        f(k, r, r * inputs, std::min(s.n, (r + 1) * inputs), q * samples, std::min(s.B, (q + 1) * samples));
      }
    });
  }
};

template <class T, class S>
const T* widened(const S* from, int64_t count, T* to) {
  if constexpr (std::is_same_v<T, S>) {
    return from;
  } else {
    for (int64_t k = 0; k < count; ++k) {
      to[k] = static_cast<T>(from[k]);
    }
    return to;
  }
}

// A tile's parameters with outputs last, and its live inputs' votes and assignments for one sample.
template <class T, class P>
class Tile {
 public:
  const Problem<T, P>& q;
  const Sizes& s;
  int64_t start = 0, count = 0, live = 0;
  Buffer<int64_t> index;                       // of live inputs, in the tile
  Buffer<T> W, bias, use, ign, V, R, D, open;  // of inputs, but V, R, D, open of live inputs

  Tile(const Problem<T, P>& q, int64_t inputs)
      : q(q), s(q.s), index(inputs), W((q.shared ? 1 : inputs) * s.weights()), bias((q.shared ? 1 : inputs) * s.votes()),
        use((q.shared ? 1 : inputs) * s.p), ign((q.shared ? 1 : inputs) * s.p), V(inputs * s.votes()), R(inputs * s.p),
        D(inputs * s.p), open(q.mask != nullptr ? inputs * s.p : 0), mu_(inputs * s.c * s.d),
        wide_(std::is_same_v<T, P> ? 0 : s.m * std::max(s.c, s.d) * s.h) {
    if (q.shared) {
      load(0, 0);
    }
  }

  void begin(int64_t at, int64_t inputs) {
    start = at;
    count = inputs;
    for (int64_t i = 0; i < count && !q.shared; ++i) {
      load(start + i, i);
    }
  }

  // which of the tile's inputs is the live one's set of parameters
  int64_t parameters(int64_t k) const { return q.shared ? 0 : index[k]; }
  T gate(int64_t b, int64_t k) const { return q.gate[b * s.n + start + index[k]]; }
  const T* mu_inp(int64_t b, int64_t k) const { return q.mu_inp + (b * s.n + start + index[k]) * s.c * s.d; }
  const T* opened(int64_t k) const { return q.mask != nullptr ? open + k * s.p : nullptr; }
  // all live inputs' matrices, one after another
  const T* all_mu_inp(int64_t b) const {
    if (live == count) {
      return mu_inp(b, 0);
    }
    for (int64_t k = 0; k < live; ++k) {
      std::copy_n(mu_inp(b, k), s.c * s.d, mu_ + k * s.c * s.d);
    }
    return mu_;
  }

  // votes and assignments of sample b; false if no input is live
  bool assign(int64_t b) {
    const auto& f = rows<T>();
    live = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (q.gate[b * s.n + start + i] == 0) {
        continue;
      }
      int64_t ways = s.m;
      if (q.mask != nullptr) {
        const uint8_t* closed = q.mask + b * q.mask_batch + (start + i) * q.mask_row;
        T* to = open + live * s.p;
        ways = 0;
        for (int64_t j = 0; j < s.m; ++j) {
          const bool is_open = closed[j * q.mask_col] == 0;
          to[j] = is_open ? T(1) : T(0);
          ways += is_open;
        }
        std::fill(to + s.m, to + s.p, T(0));
        if (ways == 0) {
          continue;
        }
      }
      index[live++] = i;
      if (q.first) {
        f.assign_even(s, R + (live - 1) * s.p, D + (live - 1) * s.p, T(1) / static_cast<T>(ways), opened(live - 1),
                      gate(b, live - 1));
      }
    }
    if (live == 0) {
      return false;
    }
    if (q.shared) {
      f.votes(s, V, all_mu_inp(b), W, bias, live * s.c);
    }
    for (int64_t k = 0; k < live; ++k) {
      if (!q.shared) {
        f.votes(s, V + k * s.votes(), mu_inp(b, k), W + index[k] * s.weights(), bias + index[k] * s.votes(), s.c);
      }
      if (!q.first) {
        f.assign(s, R + k * s.p, D + k * s.p, V + k * s.votes(), q.previous(b), opened(k), gate(b, k));
      }
    }
    return true;
  }

 private:
  void load(int64_t i, int64_t to) {
    const auto& f = rows<T>();
    const int64_t dh = s.d * s.h, ch = s.c * s.h;
    f.turn(W + to * s.weights(), widened<T>(q.W + i * s.m * dh, s.m * dh, wide_), s.m, dh, s.p);
    f.turn(bias + to * s.votes(), widened<T>(q.bias + i * s.m * ch, s.m * ch, wide_), s.m, ch, s.p);
    f.turn(use + to * s.p, widened<T>(q.use + i * s.m, s.m, wide_), s.m, 1, s.p);
    f.turn(ign + to * s.p, widened<T>(q.ign + i * s.m, s.m, wide_), s.m, 1, s.p);
  }

  Buffer<T> mu_, wide_;
};

// ------------------------------------------------------------------------------------------------ forward

template <class T, class P>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Inputs& in) {
  const Problem<T, P> q(in);
  const Sizes& s = q.s;
  const auto& f = rows<T>();
  const Division division(s, q.shared, false, sizeof(T));
  const int64_t ch = s.c * s.h, few = s.B * s.p, many = few * ch;
  Buffer<double> N0(division.row_pieces * few, 0), a(division.row_pieces * few, 0);
  Buffer<double> mean(division.row_pieces * many, 0), M2(division.row_pieces * many, 0);

  division.parallel(s, [&](int64_t, int64_t piece, int64_t begin, int64_t end, int64_t b0, int64_t b1) {
    Tile<T, P> tile(q, division.tile);
    Buffer<T> scratch(6 * s.p), a_part(s.p, T(0));
    for (int64_t i = begin; i < end; i += division.tile) {
      tile.begin(i, std::min(division.tile, end - i));
      for (int64_t b = b0; b < b1; ++b) {
        if (!tile.assign(b)) {
          continue;
        }
        for (int64_t k = 0; k < tile.live; ++k) {
          const int64_t at = tile.parameters(k) * s.p;
          f.activate(s, a_part, tile.D + k * s.p, tile.use + at, tile.ign + at, tile.opened(k), tile.gate(b, k));
        }
        f.drain(a + piece * few + b * s.p, a_part, s.p);
        const int64_t at = piece * many + b * ch * s.p;
        f.moments(s, {N0 + piece * few + b * s.p, mean + at, M2 + at}, tile.V, tile.D, tile.live, scratch);
      }
    }
  });

  for (int64_t piece = 1; piece < division.row_pieces; ++piece) {
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t j = 0; j < s.m; ++j) {
        const int64_t at = b * s.p + j;
        const double before = N0[at], more = N0[piece * few + at], after = before + more;
        const double share = more != 0 ? more / after : 0;
        N0[at] = after;
        a[at] += a[piece * few + at];
        for (int64_t x = 0; x < ch; ++x) {
          const int64_t to = (b * ch + x) * s.p + j, from = piece * many + to;
          const double step = mean[from] - mean[to];
          mean[to] += step * share;
          M2[to] += M2[from] + step * step * before * share;
        }
      }
    }
  }
  const Tensor rounded = as_tensor<T>(mean, s, true);
  for (int64_t x = 0; x < many; ++x) {
    mean[x] -= static_cast<T>(mean[x]);
  }
  return {as_tensor<T>(N0, s, false), rounded, as_tensor<T>(M2, s, true), as_tensor<T>(a, s, false),
          as_tensor<T>(mean, s, true)};
}

// ------------------------------------------------------------------------------------------------ backward

struct GradTensors {
  const Tensor &center, &g1, &g2, &k, &da;
  bool fresh;
  Tensor& dgate;
  const OptionalTensor &dmu_inp, &dW, &dbias, &duse, &dign;
};

// A tile's gradients of parameters, in the layout of the tile's parameters.
template <class T>
struct ParameterGrads {
  Buffer<T> W, bias, use, ign;
  int64_t sets;
  ParameterGrads(const Sizes& s, int64_t sets)
      : W(sets * s.weights(), T(0)), bias(sets * s.votes(), T(0)), use(sets * s.p, T(0)), ign(sets * s.p, T(0)),
        sets(sets) {}
};

// All gradients of shared parameters that a piece makes.
struct SharedGrads {
  Buffer<double> W, bias, use, ign;
  SharedGrads(const Sizes& s, int64_t pieces)
      : W(pieces * s.weights(), 0), bias(pieces * s.votes(), 0), use(pieces * s.p, 0), ign(pieces * s.p, 0) {}
};

template <class T>
void finish_shared(T* to, double* from, int64_t pieces, int64_t m, int64_t k, int64_t p, bool fresh) {
  for (int64_t piece = 1; piece < pieces; ++piece) {
    for (int64_t x = 0; x < k * p; ++x) {
      from[x] += from[piece * k * p + x];
    }
  }
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t x = 0; x < k; ++x) {
      const T made = static_cast<T>(from[x * p + j]);
      to[j * k + x] = fresh ? made : to[j * k + x] + made;
    }
  }
}

template <class T, class P>
std::tuple<Tensor, Tensor, Tensor> backward(const Inputs& in, const GradTensors& out) {
  const Problem<T, P> q(in);
  const Sizes& s = q.s;
  const auto& f = rows<T>();
  const Division division(s, q.shared, true, sizeof(T));
  const int64_t ch = s.c * s.h, dh = s.d * s.h, few = s.B * s.p, many = few * ch, cd = s.c * s.d;
  const bool fresh = out.fresh, wants = out.dW.has_value();
  const Buffer<T> center = turned<T>(out.center, s, ch), g1 = turned<T>(out.g1, s, ch), g2 = turned<T>(out.g2, s, ch);
  const Buffer<T> k_out = turned<T>(out.k, s, 1), da = turned<T>(out.da, s, 1);
  T *dgate = static_cast<T*>(out.dgate.data_ptr()), *dmu = pointer<T>(out.dmu_inp);
  const int64_t sums = q.first ? 0 : division.row_pieces;
  Buffer<double> A0(sums * few, 0), A1(sums * many, 0), A2(sums * many, 0);
  SharedGrads all(s, wants && q.shared ? division.pieces() : 0);

  division.parallel(s, [&](int64_t number, int64_t piece, int64_t begin, int64_t end, int64_t b0, int64_t b1) {
    Tile<T, P> tile(q, division.tile);
    ParameterGrads<T> made(s, !wants ? 0 : q.shared ? 1 : division.tile);
    Buffer<T> dl(division.tile * s.p), scratch(2 * s.p), rows_of(division.tile * cd);
    for (int64_t i0 = begin; i0 < end; i0 += division.tile) {
      tile.begin(i0, std::min(division.tile, end - i0));
      for (int64_t b = b0; b < b1; ++b) {
        const bool any = tile.assign(b);
        if (fresh) {  // what is not live gets zeros
          std::fill_n(dgate + b * s.n + i0, tile.count, T(0));
          if (dmu != nullptr && tile.live < tile.count) {
            std::fill_n(dmu + (b * s.n + i0) * cd, tile.count * cd, T(0));
          }
        }
        if (!any) {
          continue;
        }
        const OutGrads<T> g{center + b * s.votes(), g1 + b * s.votes(), g2 + b * s.votes(), k_out + b * s.p,
                            da + b * s.p};
        for (int64_t k = 0; k < tile.live; ++k) {
          const int64_t at = tile.parameters(k) * s.p;
          dgate[b * s.n + i0 + tile.index[k]] += f.differentiate(
              s, dl + k * s.p, tile.V + k * s.votes(), tile.R + k * s.p, tile.D + k * s.p, g, q.first, tile.use + at,
              tile.ign + at, tile.opened(k), tile.gate(b, k), wants ? made.use + at : nullptr,
              wants ? made.ign + at : nullptr);
        }
        PreviousSums to{};
        if (!q.first) {
          to = {A0 + piece * few + b * s.p, A1 + piece * many + b * s.votes(), A2 + piece * many + b * s.votes()};
        }
        f.spread(s, tile.V, tile.D, dl, g, q.previous(b), to, tile.live, scratch);
        if (q.shared && tile.live == tile.count) {
          if (dmu != nullptr) {
            f.input_gradient(s, dmu + (b * s.n + i0) * cd, tile.V, tile.W, tile.live * s.c, !fresh);
          }
        } else if (dmu != nullptr) {
          for (int64_t k = 0; k < tile.live; ++k) {
            f.input_gradient(s, dmu + (b * s.n + i0 + tile.index[k]) * cd, tile.V + k * s.votes(),
                             tile.W + tile.parameters(k) * s.weights(), s.c, !fresh);
          }
        }
        if (!wants) {
          continue;
        }
        if (q.shared) {
          f.weight_gradient(s, made.W, made.bias, tile.all_mu_inp(b), tile.V, tile.live * s.c);
          f.drain(all.W + number * s.weights(), made.W, s.weights());
          f.drain(all.bias + number * s.votes(), made.bias, s.votes());
          f.drain(all.use + number * s.p, made.use, s.p);
          f.drain(all.ign + number * s.p, made.ign, s.p);
        } else {
          for (int64_t k = 0; k < tile.live; ++k) {
            f.weight_gradient(s, made.W + tile.index[k] * s.weights(), made.bias + tile.index[k] * s.votes(),
                              tile.mu_inp(b, k), tile.V + k * s.votes(), s.c);
          }
        }
      }
      if (wants && !q.shared) {
        T *dW = pointer<T>(out.dW), *dbias = pointer<T>(out.dbias), *duse = pointer<T>(out.duse),
          *dign = pointer<T>(out.dign);
        for (int64_t i = 0; i < tile.count; ++i) {
          f.turn_back(dW + (i0 + i) * s.m * dh, made.W + i * s.weights(), s.m, dh, s.p, !fresh);
          f.turn_back(dbias + (i0 + i) * s.m * ch, made.bias + i * s.votes(), s.m, ch, s.p, !fresh);
          f.turn_back(duse + (i0 + i) * s.m, made.use + i * s.p, s.m, 1, s.p, !fresh);
          f.turn_back(dign + (i0 + i) * s.m, made.ign + i * s.p, s.m, 1, s.p, !fresh);
        }
        std::fill_n(static_cast<T*>(made.W), tile.count * s.weights(), T(0));
        std::fill_n(static_cast<T*>(made.bias), tile.count * s.votes(), T(0));
        std::fill_n(static_cast<T*>(made.use), tile.count * s.p, T(0));
        std::fill_n(static_cast<T*>(made.ign), tile.count * s.p, T(0));
      }
    }
  });

  if (wants && q.shared) {
    const int64_t pieces = division.pieces();
    finish_shared(pointer<T>(out.dW), all.W, pieces, s.m, dh, s.p, fresh);
    finish_shared(pointer<T>(out.dbias), all.bias, pieces, s.m, ch, s.p, fresh);
    finish_shared(pointer<T>(out.duse), all.use, pieces, s.m, 1, s.p, fresh);
    finish_shared(pointer<T>(out.dign), all.ign, pieces, s.m, 1, s.p, fresh);
  }
  if (q.first) {
    constexpr ScalarType type = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
    return {empty_cpu<1>({0}, type), empty_cpu<1>({0}, type), empty_cpu<1>({0}, type)};
  }
  for (int64_t piece = 1; piece < division.row_pieces; ++piece) {
    for (int64_t x = 0; x < few; ++x) {
      A0[x] += A0[piece * few + x];
    }
    for (int64_t x = 0; x < many; ++x) {
      A1[x] += A1[piece * many + x];
      A2[x] += A2[piece * many + x];
    }
  }
  return {as_tensor<T>(A0, s, false), as_tensor<T>(A1, s, true), as_tensor<T>(A2, s, true)};
}

// Calls f with (sums, parameters) as types.
template <class F>
auto with_types(const Inputs& in, const F& f) {
  if (in.mu_inp.scalar_type() == ScalarType::Double) {
    return f(double(), double());
  }
  if (in.W.scalar_type() == ScalarType::BFloat16) {
    return f(float(), BFloat16());
  }
  return f(float(), float());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_op(
    const Tensor& gate, const Tensor& mu_inp, const Tensor& W, const Tensor& bias, const Tensor& use, const Tensor& ign,
    const OptionalTensor& mask, const OptionalTensor& prior, const OptionalTensor& mu, const OptionalTensor& weight) {
  const Inputs in{gate, mu_inp, W, bias, use, ign, mask, prior, mu, weight};
  return with_types(in, [&](auto t, auto p) { return forward<decltype(t), decltype(p)>(in); });
}

std::tuple<Tensor, Tensor, Tensor> backward_op(
    const Tensor& gate, const Tensor& mu_inp, const Tensor& W, const Tensor& bias, const Tensor& use, const Tensor& ign,
    const OptionalTensor& mask, const OptionalTensor& prior, const OptionalTensor& mu, const OptionalTensor& weight,
    const Tensor& center, const Tensor& g1, const Tensor& g2, const Tensor& k, const Tensor& da, bool fresh,
    Tensor dgate, OptionalTensor dmu_inp, OptionalTensor dW, OptionalTensor dbias, OptionalTensor duse,
    OptionalTensor dign) {
  const Inputs in{gate, mu_inp, W, bias, use, ign, mask, prior, mu, weight};
  const GradTensors out{center, g1, g2, k, da, fresh, dgate, dmu_inp, dW, dbias, duse, dign};
  return with_types(in, [&](auto t, auto p) { return backward<decltype(t), decltype(p)>(in, out); });
}

}  // namespace
}  // namespace fastroute::matrix_routing

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_matrix_routing_native", TORCH_BOX(&fastroute::matrix_routing::forward_op));
  library.impl("_matrix_routing_native_backward", TORCH_BOX(&fastroute::matrix_routing::backward_op));
}

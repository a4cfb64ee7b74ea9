// vector_routing on a CPU: tiles of input rows that stay in cache, matrix products through torch, row mathematics in
// rows.inc. The contract is fastroute/ops/vector_routing/contract.py; the derivation, docs/vector_routing.md.
//
// Rows are divided into a number of pieces that depends on the shape only. Pieces run in parallel, each with sums of its
// own, and the sums are added in order at the end: the same input gives the same bits on any number of threads.
//
// Axes: B batch, n inputs, m outputs, d width of an input. A tile's block holds groups of m columns per row: forward
// [L, later phi | use | ign] (first iteration: [use | ign], phi apart), backward [<x, dM>, later phi | L, later dL | use | ign];
// betas only when they are linear in x.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/gemm.h"

namespace fastroute::vector_routing {

using BFloat16 = torch::headeronly::BFloat16;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// One tile's arrays, as the row functions see them. A stride of 0 gives every row the same parameters.
template <class T>
struct Rows {
  int64_t rows, m, ld, phi_ld;
  T *phi, *L;
  const T *use, *ign;
  int64_t beta_stride, ign_stride;
  const T *use_bias, *ign_bias;  // still to be added to linear betas; null where there is nothing to add
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

// The rows from ``start`` on, ``count`` of them.
template <class T>
Rows<T> window(Rows<T> a, int64_t start, int64_t count) {
  a.rows = count;
  a.phi += start * a.phi_ld;
  a.L = a.L == nullptr ? nullptr : a.L + start * a.ld;
  a.use += start * a.beta_stride;
  a.ign += start * a.ign_stride;
  a.w = a.w == nullptr ? nullptr : a.w + start * a.score_stride;
  a.b = a.b == nullptr ? nullptr : a.b + start * a.score_stride;
  a.mask = a.mask == nullptr ? nullptr : a.mask + start * a.mask_row;
  a.gate += start;
  if (a.dgate != nullptr) {
    a.dgate += start;
    a.duse += start * a.dbeta_stride;
    a.dign += start * a.dign_stride;
    a.dw += start * a.dscore_stride;
    a.db += start * a.dscore_stride;
  }
  return a;
}

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

// The row functions for this processor, chosen once.
template <class T>
const Functions<T>& rows();
extern template const Functions<float>& rows<float>();
extern template const Functions<double>& rows<double>();

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
Parameter<S> parameter(const OptionalTensor& t, bool one_row) {
  if (!t.has_value()) {
    return {};
  }
  const int64_t width = t->dim() > 1 ? t->size(1) : 1;
  return {static_cast<S*>(t->data_ptr()), one_row ? 0 : width};
}

struct Inputs {
  const Tensor& x;
  const OptionalTensor &gate, &gate_weight, &gate_bias, &scale, &pred, &score_weight, &score_bias;
  const Tensor& use;
  const OptionalTensor &ign, &use_bias, &ign_bias, &prior, &mask, &lengths;

  // One row of parameters serves every input, however many there are.
  bool one_row(const OptionalTensor& t) const {
    return t.has_value() && t->size(0) == 1 && (use_bias.has_value() || x.size(1) > 1);
  }
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
        ign_bias(pointer<T>(in.ign_bias)), gate_weight(parameter<P>(in.gate_weight, in.one_row(in.gate_weight))),
        gate_bias(parameter<P>(in.gate_bias, in.one_row(in.gate_bias))), score_weight(parameter<P>(in.score_weight, in.one_row(in.score_weight))),
        score_bias(parameter<P>(in.score_bias, in.one_row(in.score_bias))), mask(pointer<uint8_t>(in.mask)),
        mask_batch(mask != nullptr ? in.mask->stride(0) : 0), mask_row(mask != nullptr ? in.mask->stride(1) : 0),
        mask_col(mask != nullptr ? in.mask->stride(2) : 0), lengths(pointer<int64_t>(in.lengths)) {
    m = linear ? in.use.size(0) : in.use.size(1);
    use_weight = linear ? static_cast<const T*>(in.use.data_ptr()) : nullptr;
    ign_weight = linear && has_ign ? static_cast<const T*>(in.ign->data_ptr()) : nullptr;
    if (!linear) {
      use = {static_cast<P*>(in.use.data_ptr()), m};
      ign = parameter<P>(in.ign, false);
      ign.stride = has_ign ? m : 0;
    }
    if (first) {
      score_weight = score_bias = {};
    }
  }

  int64_t live(int64_t b, int64_t start, int64_t stop) const {
    return lengths == nullptr ? stop - start : std::clamp(lengths[b], start, stop) - start;
  }
};

// How the work is divided, by shape only: ``row_pieces`` times ``sample_pieces`` pieces run in parallel, each over tiles of
// rows and, within a tile, over groups of samples small enough to stay in cache and multiplied together.
struct Division {
  int64_t row_pieces, rows, tile, sample_pieces, samples, group;

  // groups: blocks of m columns; per_row: what one more piece of samples costs in sums of its own, per input row
  Division(int64_t B, int64_t n, int64_t m, int64_t d, int64_t groups, int64_t per_row, bool padded, size_t itemsize) {
    const int64_t spare = (int64_t{2} << 20) / std::max<int64_t>(1, n * per_row);
    sample_pieces = std::clamp<int64_t>(std::min(B / 4, 1 + spare), 1, 8);
    samples = (B + sample_pieces - 1) / sample_pieces;
    sample_pieces = (B + samples - 1) / samples;
    row_pieces = std::clamp<int64_t>(n * std::min<int64_t>(B, 8) / 256, 1, 8 / sample_pieces);
    row_pieces = std::min(row_pieces, std::max<int64_t>(2, (int64_t{1} << 22) / (B * m * d)));
    rows = (n + row_pieces - 1) / row_pieces;
    row_pieces = (n + rows - 1) / rows;
    const int64_t cache = (int64_t{3} << 19) / static_cast<int64_t>(itemsize), width = d + groups * m;
    const int64_t most = std::clamp<int64_t>(cache / width / 16 * 16, 384, 2048);
    const int64_t tiles = (rows + most - 1) / most;
    tile = (rows + tiles - 1) / tiles;
    group = padded || is_large(tile * m * d) ? 1 : std::clamp<int64_t>(cache / (tile * width), 1, samples);
  }
  int64_t pieces() const { return row_pieces * sample_pieces; }
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

// What both passes give the row functions for a tile, whatever the sample.
template <class T, class P>
class TileRows {
 public:
  template <class X>
  TileRows(const Problem<T, X, P>& q, int64_t tile)
      : w_(q.score_weight, tile, q.m), b_(q.score_bias, tile, q.m), use_(q.use, tile, q.m), ign_(q.ign, tile, q.m),
        scratch_(3 * q.m), zeros_(q.m, T(0)) {}

  // ld: columns of the tile's block, where betas linear in x will be found
  template <class X>
  Rows<T> operator()(const Problem<T, X, P>& q, int64_t start, int64_t count, int64_t ld) const {
    Rows<T> a{};
    a.m = q.m;
    a.ld = a.phi_ld = ld;
    a.w = w_.rows(start, count);
    a.b = b_.rows(start, count);
    a.score_stride = q.score_weight.stride;
    a.use = use_.rows(start, count);
    a.beta_stride = q.linear ? ld : q.m;
    a.ign = q.has_ign && !q.linear ? ign_.rows(start, count) : static_cast<const T*>(zeros_);
    a.ign_stride = q.has_ign ? a.beta_stride : 0;
    a.prior = q.prior;
    a.mask_row = q.mask_row;
    a.mask_col = q.mask_col;
    a.scratch = scratch_;
    return a;
  }

 private:
  Loaded<T, P> w_, b_, use_, ign_;
  Buffer<T> scratch_, zeros_;
};

// Rows of a group of samples in the dtype of sums: x itself where it is that already.
template <class T, class X, class P>
Matrix<const T> load_x(const Problem<T, X, P>& q, int64_t b, int64_t samples, int64_t start, int64_t rows, T* copy) {
  const X* x = q.x + b * q.x_batch + start * q.x_row;
  if constexpr (std::is_same_v<T, X>) {
    return Matrix<const T>(x, rows, q.d, q.x_row).batched(samples, q.x_batch);
  } else {
    for (int64_t k = 0; k < samples * rows; ++k) {
      convert(copy + k * q.d, x + k / rows * q.x_batch + k % rows * q.x_row, q.d);
    }
    return Matrix<const T>(copy, rows, q.d, q.d).batched(samples, rows * q.d);
  }
}

// Products per sample accumulated over tiles, [B, count].
template <class T>
class Accumulated {
 public:
  Accumulated(T* data, int64_t B, int64_t count) : data_(data), count_(count), begun_(B, false) {}
  void add(int64_t b0, int64_t samples, const T* products) {
    for (int64_t b = b0; b < b0 + samples; ++b, products += count_) {
      if (begun_[b]) {
        rows<T>().add_to(data_ + b * count_, products, count_);
      } else {
        std::copy_n(products, count_, data_ + b * count_);
        begun_[b] = true;
      }
    }
  }
  // A sample without a live row has zeros.
  void finish(int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      if (!begun_[b]) {
        std::fill_n(data_ + b * count_, count_, T(0));
      }
    }
  }

 private:
  T* data_;
  int64_t count_;
  std::vector<bool> begun_;
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

// Sums over rows, made in T over groups of this many rows and in double over groups: as close to the exact sum as torch's
// own cascaded sums are, however many rows there are.
constexpr int64_t kGroup = 16;

template <class T>
void drain(double* totals, T* group, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    totals[k] += group[k];
    group[k] = T(0);
  }
}

template <class T>
void sum_totals(T* out, const double* parts, int64_t pieces, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    double sum = 0;
    for (int64_t s = 0; s < pieces; ++s) {
      sum += parts[s * count + k];
    }
    out[k] = static_cast<T>(sum);
  }
}

template <class F>
void parallel_pieces(int64_t pieces, const F& f) {
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      f(s);
    }
  });
}

// What multiplies x, per sample [groups m, d]: the rows of [P] [use] [ign] [dM], those there are; and its transpose.
// dx is one sum over all of them, and phi dM mostly its largest part: coming last, it leaves the others their digits.
template <class T>
struct Operand {
  int64_t d, groups_m;
  Buffer<T> rows, columns;

  template <class X, class P>
  Operand(const Problem<T, X, P>& q, const T* dM, int64_t groups)
      : d(q.d), groups_m(groups * q.m), rows(q.B * groups_m * d), columns(q.B * groups_m * d) {
    const int64_t block = q.m * d;
    torch::stable::parallel_for(0, q.B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        T *first = rows + b * groups_m * d, *to = first, *turned = columns + b * groups_m * d;
        for (const T* from : {q.first ? nullptr : q.pred + b * block, q.use_weight, q.ign_weight,
                              dM == nullptr ? nullptr : dM + b * block}) {
          if (from != nullptr) {
            to = std::copy_n(from, block, to);
          }
        }
        for (int64_t j0 = 0; j0 < groups_m; j0 += 16) {
          for (int64_t c = 0; c < d; ++c) {
            for (int64_t j = j0; j < std::min(j0 + 16, groups_m); ++j) {
              turned[c * groups_m + j] = first[j * d + c];
            }
          }
        }
      }
    });
  }
  // [groups m, d] and [d, groups m] of samples from b on
  Matrix<const T> by_row(int64_t b, int64_t samples) const {
    return Matrix<const T>(rows + b * groups_m * d, groups_m, d, d).batched(samples, groups_m * d);
  }
  Matrix<const T> by_column(int64_t b, int64_t samples) const {
    return Matrix<const T>(columns + b * groups_m * d, d, groups_m, groups_m).batched(samples, groups_m * d);
  }
};

template <class T, class X, class P>
void add_biases(const Problem<T, X, P>& q, T* use, T* ign, int64_t count, int64_t ld) {
  for (int64_t i = 0; i < count; ++i) {
    rows<T>().add_to(use + i * ld, q.use_bias, q.m);
    if (q.has_ign) {
      rows<T>().add_to(ign + i * ld, q.ign_bias, q.m);
    }
  }
}

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

inline ScalarType parameter_type(const Inputs& in) {
  return in.use_bias.has_value() ? (in.x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float)
                                 : in.use.scalar_type();
}

// What a call's tensors are, once they are known to fit one another.
struct Fitting {
  int64_t B, n, m, d;
  ScalarType sums, parameters;  // dtypes; the second, of what has a row per input
  bool linear;

  Fitting(const Check& check, const Inputs& in) {
    check.tensor("x", in.x, kFloats, {kAny, kAny, kAny}, Layout::kRows);
    const ScalarType x = in.x.scalar_type();
    B = in.x.size(0);
    n = in.x.size(1);
    d = in.x.size(2);
    sums = x == ScalarType::Double ? x : ScalarType::Float;
    linear = in.use_bias.has_value();
    const bool halves = x == ScalarType::BFloat16 && parameter_type(in) == ScalarType::BFloat16;
    parameters = halves ? ScalarType::BFloat16 : sums;
    check.axes("use", in.use, 2);
    m = in.use.size(linear ? 0 : 1);
    check.that(std::min({B, n, m, d}) >= 1, "x, use: expected none empty");
    check_betas(check, in);
    check.that(in.gate_weight.has_value() == in.gate_bias.has_value() &&
                   (!in.gate_weight.has_value() || in.scale.has_value()),
               "gate_weight: expected with gate_bias and scale");
    check.that(in.gate.has_value() || in.gate_weight.has_value(), "gate: expected one, or what makes it");
    check.tensor("gate", in.gate, sums, {B, n});
    check.tensor("scale", in.scale, sums, {B});
    check_rows(check, "gate_weight, gate_bias", in, in.gate_weight, in.gate_bias, d, false);
    check.that(in.pred.has_value() ? in.score_weight.has_value() : in.prior.has_value(),
               "pred: expected with score_weight, or a prior");
    check.tensor("pred", in.pred, sums, {B, m, d});
    check.tensor("prior", in.prior, sums, {m});
    check.that(in.score_weight.has_value() == in.score_bias.has_value(), "score_weight: expected with score_bias");
    check_rows(check, "score_weight, score_bias", in, in.score_weight, in.score_bias, m, true);
    check.tensor("mask", in.mask, ScalarType::Bool, {B, n, m}, Layout::kStrided);
    check.tensor("lengths", in.lengths, ScalarType::Long, {B});
  }

 private:
  void check_betas(const Check& check, const Inputs& in) const {
    if (linear) {
      check.tensor("use", in.use, sums, {m, d});
      check.tensor("ign", in.ign, sums, {m, d});
      check.tensor("use_bias", in.use_bias, sums, {m});
      check.tensor("ign_bias", in.ign_bias, sums, {m});
    } else {
      check.tensor("use", in.use, parameters, {n, m});
      check.tensor("ign", in.ign, parameters, {n, m});
    }
    check.that(in.ign_bias.has_value() == (linear && in.ign.has_value()), "ign_bias: expected with ign and use_bias");
  }
  // weight [rows, width] and bias [rows, width] or [rows], of n rows or of one for all
  void check_rows(const Check& check, const char* name, const Inputs& in, const OptionalTensor& weight,
                  const OptionalTensor& bias, int64_t width, bool wide_bias) const {
    if (!weight.has_value()) {
      return;
    }
    check.axes(name, *weight, 2);
    const int64_t rows = in.one_row(weight) ? 1 : n;
    check.tensor(name, weight, parameters, {rows, width});
    if (wide_bias) {
      check.tensor(name, bias, parameters, {rows, width});
    } else {
      check.tensor(name, bias, parameters, {rows});
    }
  }
};

}  // namespace fastroute::vector_routing

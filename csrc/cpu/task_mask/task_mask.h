// What task_mask.cpp and batch_norm_mask_relu.cpp need of rows.inc: passes over runs of numbers.
//
// A number is kept as S, its storage: float, double, or uint16_t for bfloat16, which is computed with as float.
// A mask of channels is all ones or all zeros per number, as wide as the number, so that masking is an "and".
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastroute::task_mask {

template <class S>
using SumOf = std::conditional_t<std::is_same_v<S, uint16_t>, float, S>;
template <class S>
using BitsOf = std::conditional_t<sizeof(S) == 2, uint16_t, std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>>;

// A channel's (or, as arrays, every channel's) normalisation and its gradient:
// z = a (x - mean) + b;  dx = a (dz - k - (x - mean) q), with dz = g where z > 0.
// The mean is subtracted first: in a x + c with c = b - a mean, the rounding of c alone is that of a mean.
template <class P>
struct Affine {
  P a, b, mean, k, q;
};

template <class S>
struct Functions {
  using T = SumOf<S>;
  using Bits = BitsOf<S>;
  // max(x, 0);  g where not y <= 0
  void (*relu)(S* out, const S* x, int64_t n);
  void (*gate)(S* out, const S* g, const S* y, int64_t n);
  // out = 0, while what is to be zeroed next is fetched
  void (*zeros)(S* out, const S* next, int64_t n);
  // out = 0 past the caches, as memset where there is no such store; other threads may look after end_stream
  void (*stream_zeros)(S* out, int64_t n);
  void (*end_stream)();
  // the same, and x itself, where the mask is set; 0 elsewhere
  void (*mask_row)(Bits* mask, const float* mapping, int64_t n);
  void (*keep)(S* out, const S* x, const Bits* mask, int64_t n);
  void (*keep_relu)(S* out, const S* x, const Bits* mask, int64_t n);
  void (*keep_gate)(S* out, const S* g, const S* y, const Bits* mask, int64_t n);

  // one channel, n numbers: sums[0] += x - shift, sums[1] += (x - shift)^2
  void (*moments)(double* sums, const S* x, T shift, int64_t n);
  void (*normalise)(S* y, const S* x, Affine<T> f, bool relu, int64_t n);
  // sums[0] += dz, sums[1] += dz (x - mean)
  void (*gradient_sums)(double* sums, const S* g, const S* x, Affine<T> f, bool relu, int64_t n);
  // g may be null: no gradient comes, dz = 0
  void (*gradient)(S* dx, const S* g, const S* x, Affine<T> f, bool relu, int64_t n);

  // the same over rows of C channels; sums [2, C]
  void (*row_moments)(double* sums, const S* x, const T* shift, int64_t rows, int64_t C);
  void (*row_normalise)(S* y, const S* x, Affine<const T*> f, const Bits* mask, bool relu, int64_t rows, int64_t C);
  void (*row_gradient_sums)(double* sums, const S* g, const S* x, Affine<const T*> f, const Bits* mask, bool relu,
                            int64_t rows, int64_t C);
  // touched: the channels that have a gradient at all; 0 elsewhere, whatever is in x
  void (*row_gradient)(S* dx, const S* g, const S* x, Affine<const T*> f, const Bits* mask, const Bits* touched,
                       bool relu, int64_t rows, int64_t C);
};

// The functions for this processor, chosen once.
template <class S>
const Functions<S>& functions();
extern template const Functions<float>& functions<float>();
extern template const Functions<double>& functions<double>();
extern template const Functions<uint16_t>& functions<uint16_t>();

}  // namespace fastroute::task_mask

// grouped_linear for other ops, and matrix products over rows that lie anywhere: what it needs of its kernels.
//
// A matrix is an array of pointers to its rows, or one pointer and a stride. S is the type in memory, uint16_t for
// bfloat16; sums are float or double. The order of every sum of one of these depends on the widths alone, so that rows
// and columns may be divided into tiles in any way and give the same bits.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/lists.h"

namespace fastroute::grouped_linear {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The contract is fastroute/ops/grouped_linear/reference.py; `kind` is an activation's number.
std::tuple<Tensor, Tensor> forward_op(
    const Tensor& x, const OptionalTensor& take, const OptionalTensor& put, const Tensor& offsets,
    const Tensors& weights, const Tensors& biases, int64_t kind, bool keep);
std::tuple<Tensor, Tensors, Tensors> backward_op(
    const Tensor& grad, const Tensor& x, const OptionalTensor& take, const OptionalTensor& spread,
    const OptionalTensor& put, const Tensor& offsets, const Tensors& weights, int64_t modules, bool want_x,
    bool want_weights, bool want_biases, int64_t kind, const OptionalTensor& kept, bool stacked, bool keep_empty);

// The type that sums of S are made in.
template <class S>
struct Sum {
  using type = S;
};
template <>
struct Sum<uint16_t> {
  using type = float;
};

// outer() sums runs of kRun rows, in tiles of kPanel columns of a.
constexpr int64_t kRun = 128;
constexpr int64_t kPanel = 6;

template <class S>
struct Kernels {
  // out[i][j] = sum_l a[i][l] b[j ldb + l] + bias[j], for `rows` i, n j and k l; bias may be null
  void (*dot)(
      S* const* out, const S* const* a, int64_t rows, const S* b, int64_t ldb, const S* bias, int64_t n, int64_t k);
  // the same for many rows, and `lanes` columns or more, by turning rows of b: no sum is over lanes, so that its order is
  // another one; scratch: 2 lanes (kRun + rows) numbers
  void (*dot_turned)(
      S* const* out, const S* const* a, int64_t rows, const S* b, int64_t ldb, const S* bias, int64_t n, int64_t k,
      typename Sum<S>::type* scratch);
  // whether that pays for so many rows
  bool (*turns)(int64_t rows, int64_t n, int64_t k);
  // out[i][j] = sum_l a[i][l] b[l ldb + j] + bias[j]
  void (*combine)(
      S* const* out, const S* const* a, int64_t rows, const S* b, int64_t ldb, const S* bias, int64_t n, int64_t k);
  // the same to the bit, for `lanes` columns or more, by copying columns of b: for sums so long that those which a tile
  // reads do not stay in a cache from one tile to the next; scratch as above
  void (*combine_packed)(
      S* const* out, const S* const* a, int64_t rows, const S* b, int64_t ldb, const S* bias, int64_t n, int64_t k,
      typename Sum<S>::type* scratch);
  bool (*packs)(int64_t rows, int64_t n, int64_t k);
  // out[i ldo + j] = sum_l a[l][i] b[l][j], for i in [i0, i1); scratch: outer_scratch(rows, i1 - i0, n) numbers
  void (*outer)(
      S* out, int64_t ldo, const S* const* a, const S* const* b, int64_t rows, int64_t i0, int64_t i1, int64_t n,
      typename Sum<S>::type* scratch);
  int64_t (*outer_scratch)(int64_t rows, int64_t columns, int64_t n);
  // out[j] = sum_l a[l][j], for j in [j0, j1)
  void (*sum)(S* out, const S* const* a, int64_t rows, int64_t j0, int64_t j1);
  int64_t lanes;
};

// The kernels for this processor, chosen once.
template <class S>
const Kernels<S>& kernels();
extern template const Kernels<float>& kernels<float>();
extern template const Kernels<double>& kernels<double>();
extern template const Kernels<uint16_t>& kernels<uint16_t>();

}  // namespace fastroute::grouped_linear

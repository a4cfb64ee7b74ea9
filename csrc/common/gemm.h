// Matrix products through torch's dispatcher, on views of plain memory: the speed of the library torch was built with,
// its thread pool and its precision settings, without linking another BLAS.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>

namespace fastroute {

using torch::stable::Tensor;

template <class T>
constexpr torch::headeronly::ScalarType scalar_type_of();
template <>
constexpr torch::headeronly::ScalarType scalar_type_of<float>() {
  return torch::headeronly::ScalarType::Float;
}
template <>
constexpr torch::headeronly::ScalarType scalar_type_of<double>() {
  return torch::headeronly::ScalarType::Double;
}

// A matrix in memory somebody else owns.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, row_stride, col_stride;

  Matrix(T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride = 1)
      : data(data), rows(rows), cols(cols), row_stride(row_stride), col_stride(col_stride) {}

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }

  Tensor tensor() const {
    const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
    return torch::stable::from_blob(
        const_cast<std::remove_const_t<T>*>(data), sizes, strides,
        torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type_of<std::remove_const_t<T>>());
  }
};

// out = a b. aten::mm.out takes no accumulator, so callers that add do it themselves.
template <class T, class A, class B>
void mm(const Matrix<T>& out, const Matrix<A>& a, const Matrix<B>& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a.tensor()), from(b.tensor()), from(out.tensor())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference
}

}  // namespace fastroute

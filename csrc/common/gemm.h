// Matrix products through torch's dispatcher, on views of plain memory: the speed of the library torch was built with,
// its thread pool and its precision settings, without linking another BLAS.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

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

// A matrix in memory somebody else owns, or a batch of them.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, row_stride, col_stride;
  int64_t batch = 1, batch_stride = 0;

  Matrix(T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride = 1)
      : data(data), rows(rows), cols(cols), row_stride(row_stride), col_stride(col_stride) {}

  Matrix batched(int64_t count, int64_t stride) const {
    Matrix all = *this;
    all.batch = count;
    all.batch_stride = stride;
    return all;
  }
  Matrix transposed() const { return Matrix(data, cols, rows, col_stride, row_stride).batched(batch, batch_stride); }
  bool is_row_major() const { return col_stride == 1 && row_stride == cols; }

  Tensor tensor() const {
    const std::array<int64_t, 3> sizes{batch, rows, cols}, strides{batch_stride, row_stride, col_stride};
    const size_t skip = batch == 1 ? 1 : 0;
    return torch::stable::from_blob(
        const_cast<std::remove_const_t<T>*>(data), {sizes.data() + skip, 3 - skip}, {strides.data() + skip, 3 - skip},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type_of<std::remove_const_t<T>>());
  }
};

// out = a b, sample by sample where they are batches. aten::mm.out takes no accumulator: callers that add do it themselves.
template <class T, class A, class B>
void mm(const Matrix<T>& out, const Matrix<A>& a, const Matrix<B>& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a.tensor()), from(b.tensor()), from(out.tensor())};
  const char* name = out.batch == 1 ? "aten::mm" : "aten::bmm";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference
}

// torch carries two libraries of fp32 products. aten::mm is MKL, which on AMD's AVX-512 processors runs at about half
// of oneDNN's speed (docs/vector_routing.md has the figures); elsewhere it is as fast and has less to set up.
bool prefers_onednn();
// Worth a call of its own, and what oneDNN takes to set up; smaller products go together, a batch a call.
inline bool is_large(int64_t multiply_adds) {
  return 2 * multiply_adds > int64_t{1} << 22;
}
// a b^T by oneDNN, in memory of its own; undefined where torch has no oneDNN.
Tensor onednn_linear(const Tensor& a, const Tensor& b);

// Dense products into memory that is kept from one call to the next.
template <class T>
class Product {
 public:
  template <class A, class B>
  T* operator()(const Matrix<A>& a, const Matrix<B>& b) {
    if constexpr (std::is_same_v<T, float>) {
      // oneDNN multiplies by a matrix with gaps between its rows a hundred times slower
      if (a.batch == 1 && is_large(a.rows * b.cols * a.cols) && b.is_row_major() && prefers_onednn()) {
        return by_onednn(a, b);
      }
    }
    const int64_t size = a.rows * b.cols, needed = a.batch * size;
    if (needed > capacity_) {
      capacity_ = needed;
      own_.reset(new T[capacity_]);
    }
    mm(Matrix<T>(own_.get(), a.rows, b.cols, b.cols).batched(a.batch, size), a, b);
    return own_.get();
  }

 private:
  // oneDNN adds the terms of a sum one by one; in runs of 256, added up afterwards, it is as accurate as MKL.
  template <class A, class B>
  float* by_onednn(const Matrix<A>& a, const Matrix<B>& b) {
    constexpr int64_t run = 256;
    for (int64_t k = 0; k < a.cols; k += run) {
      const int64_t terms = std::min(run, a.cols - k);
      const Matrix<A> a_part(a.data + k * a.col_stride, a.rows, terms, a.row_stride, a.col_stride);
      const Matrix<B> b_part(b.data + k * b.row_stride, terms, b.cols, b.row_stride);
      Tensor part = onednn_linear(a_part.tensor(), b_part.transposed().tensor());
      if (k == 0) {
        made_ = std::move(part);
        continue;
      }
      float* to = static_cast<float*>(made_.data_ptr());
      const float* from = static_cast<const float*>(part.data_ptr());
#pragma omp simd
      for (int64_t i = 0; i < a.rows * b.cols; ++i) {
        to[i] += from[i];
      }
    }
    return static_cast<float*>(made_.data_ptr());
  }

  Tensor made_;
  std::unique_ptr<T[]> own_;
  int64_t capacity_ = 0;
};

}  // namespace fastroute

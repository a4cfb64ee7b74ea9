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

// While one is there, libraries use one thread of the calling one's, and choose their kernels as they do for one: MKL
// looks at how many there might be, even within a parallel region.
class OneThread {
 public:
  OneThread();
  ~OneThread();
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int of_openmp_ = 0, of_mkl_ = 0;
};

// out = a b on one thread, sample by sample where they are batches. aten::mm.out takes no accumulator: callers that add do
// it themselves.
template <class T, class A, class B>
void mm(const Matrix<T>& out, const Matrix<A>& a, const Matrix<B>& b) {
  using torch::stable::detail::from;
  const OneThread alone;
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
// A part of a product that is worth a thread: on one thread two parts of a product take 1 % longer than the whole, four
// 4 %, eight 11 to 16 % (400 x 512 by 512 x 512, AMD EPYC).
constexpr int64_t kWorthAPart = int64_t{1} << 23;
// a b^T + bias by oneDNN, in memory of its own; undefined where torch has no oneDNN.
Tensor onednn_linear(const Tensor& a, const Tensor& b, const Tensor* bias = nullptr);
// Of bfloat16, which oneDNN multiplies in float32 and rounds once: whether `multiply_adds` for each of `rows` are worth a
// call of it. On processors with AVX-512 it then takes a half to a fifth of the time of kernels that widen first.
bool onednn_multiplies_bfloat16(int64_t rows, int64_t multiply_adds);

// Dense products into memory that is kept from one call to the next. Long sums are made in runs, added up afterwards: so
// they do not depend on how a library divides them, and what oneDNN adds term by term is as accurate as MKL's.
template <class T>
class Product {
 public:
  // is_alone: nothing else runs meanwhile, so that a large product is divided among threads, by its shape alone
  explicit Product(bool is_alone = false) : is_alone_(is_alone) {}

  template <class A, class B>
  T* operator()(const Matrix<A>& a, const Matrix<B>& b) {
    if constexpr (std::is_same_v<T, float>) {
      // oneDNN multiplies by a matrix with gaps between its rows a hundred times slower
      if (a.batch == 1 && is_large(a.rows * b.cols * a.cols) && b.is_row_major() && prefers_onednn()) {
        in_runs(256, a, b, [&](const auto& a_part, const auto& b_part, bool is_first) {
          Tensor made = onednn_linear(a_part.tensor(), b_part.transposed().tensor());
          if (is_first) {
            made_ = std::move(made);
          } else {
            add(static_cast<float*>(made_.data_ptr()), static_cast<const float*>(made.data_ptr()), a.rows * b.cols);
          }
        });
        return static_cast<float*>(made_.data_ptr());
      }
    }
    const int64_t size = a.rows * b.cols;
    T* out = own_.at_least(a.batch * size);
    in_runs(kMklRun, a, b, [&](const auto& a_part, const auto& b_part, bool is_first) {
      T* to = is_first ? out : more_.at_least(a.batch * size);
      multiply(Matrix<T>(to, a.rows, b.cols, b.cols).batched(a.batch, size), a_part, b_part);
      if (!is_first) {
        add(out, to, a.batch * size);
      }
    });
    return out;
  }

 private:
  static constexpr int64_t kMklRun = 512;
  static constexpr int64_t kMostParts = 4;

  // out = a b, of a large one parts of columns or of rows on several threads
  template <class A, class B>
  void multiply(const Matrix<T>& out, const Matrix<A>& a, const Matrix<B>& b) const {
    const bool by_columns = out.cols >= out.rows;
    const int64_t size = by_columns ? out.cols : out.rows, whole = (size + 15) / 16;
    const int64_t most = std::min({a.rows * a.cols * b.cols / kWorthAPart, kMostParts, whole});
    const int64_t parts = most < 4 ? std::min<int64_t>(most, 2) : 4;
    if (!is_alone_ || out.batch > 1 || parts < 2) {
      mm(out, a, b);
      return;
    }
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t from = whole * s / parts * 16, count = std::min(whole * (s + 1) / parts * 16, size) - from;
        if (by_columns) {
          mm(Matrix<T>(out.data + from * out.col_stride, out.rows, count, out.row_stride, out.col_stride), a,
             Matrix<B>(b.data + from * b.col_stride, b.rows, count, b.row_stride, b.col_stride));
        } else {
          mm(Matrix<T>(out.data + from * out.row_stride, count, out.cols, out.row_stride, out.col_stride),
             Matrix<A>(a.data + from * a.row_stride, count, a.cols, a.row_stride, a.col_stride), b);
        }
      }
    });
  }

  // f(columns of a, as many rows of b, whether they are the first)
  template <class A, class B, class F>
  static void in_runs(int64_t run, const Matrix<A>& a, const Matrix<B>& b, const F& f) {
    for (int64_t k = 0; k == 0 || k < a.cols; k += run) {
      const int64_t terms = std::min(run, a.cols - k);
      const Matrix<A> a_part(a.data + k * a.col_stride, a.rows, terms, a.row_stride, a.col_stride);
      const Matrix<B> b_part(b.data + k * b.row_stride, terms, b.cols, b.row_stride, b.col_stride);
      f(a_part.batched(a.batch, a.batch_stride), b_part.batched(b.batch, b.batch_stride), k == 0);
    }
  }

  static void add(T* to, const T* from, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      to[i] += from[i];
    }
  }

  // Memory that grows.
  class Growing {
   public:
    T* at_least(int64_t count) {
      if (count > capacity_) {
        capacity_ = count;
        data_.reset(new T[count]);
      }
      return data_.get();
    }

   private:
    std::unique_ptr<T[]> data_;
    int64_t capacity_ = 0;
  };

  bool is_alone_;
  Tensor made_;
  Growing own_, more_;
};

}  // namespace fastroute

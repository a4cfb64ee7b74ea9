// What an op checks of its arguments before it takes a pointer from them. Anyone may call torch.ops.fastroute with
// anything: a wrong argument is an error that names it, whatever Python checked before.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fastroute {

constexpr int64_t kAny = -1;                       // a size that may be anything
constexpr int64_t kMaxModules = int64_t{1} << 26;  // of a plan, whose memory follows from a number alone

// The dtypes that most kernels have.
using Types = std::initializer_list<torch::headeronly::ScalarType>;
constexpr Types kFloats{torch::headeronly::ScalarType::Float, torch::headeronly::ScalarType::Double,
                        torch::headeronly::ScalarType::BFloat16};

enum class Layout {
  kDense,    // contiguous
  kRows,     // the last axis is contiguous
  kApart,    // any strides, but every number in a place of its own: for what is written
  kStrided,  // any strides, zero ones included
};

class Check {
  using Tensor = torch::stable::Tensor;
  using OptionalTensor = std::optional<Tensor>;
  using ScalarType = torch::headeronly::ScalarType;
  using Sizes = std::initializer_list<int64_t>;

 public:
  explicit Check(const char* op) : op_(op), device_type_(aoti_torch_device_type_cpu()) {}
  // All arguments on the GPU of this one.
  static Check on_gpu(const char* op, const Tensor& like) {
    Check made(op);
    made.device_type_ = aoti_torch_device_type_cuda();
    made.index_ = like.get_device_index();
    return made;
  }

  template <class... What>
  void that(bool holds, const What&... what) const {
    if (!holds) {
      fail(what...);
    }
  }

  void axes(const char* name, const Tensor& t, int64_t count) const {
    that(t.dim() == count, name, ": expected ", count, " axes, got ", t.dim());
  }

  void tensor(const char* name, const Tensor& t, ScalarType type, Sizes sizes, Layout layout = Layout::kDense) const {
    const Form form(t);
    placed(name, t, form);
    if (form.dtype != torch::stable::detail::to<int32_t>(torch::stable::detail::from(type))) {
      fail(name, ": expected ", torch::headeronly::toString(type), ", got ",
           torch::headeronly::toString(t.scalar_type()));
    }
    shape(name, form, sizes);
    laid_out(name, t, layout);
  }
  void tensor(const char* name, const OptionalTensor& t, ScalarType type, Sizes sizes,
              Layout layout = Layout::kDense) const {
    if (t.has_value()) {
      tensor(name, *t, type, sizes, layout);
    }
  }

  // A tensor of the dtype and the sizes of another.
  void like(const char* name, const Tensor& t, const Tensor& other, Layout layout = Layout::kStrided) const {
    const Form form(t), expected(other);
    placed(name, t, form);
    that(form.dtype == expected.dtype && form.dim == expected.dim &&
             std::equal(form.sizes, form.sizes + form.dim, expected.sizes),
         name, ": expected another dtype or other sizes");
    laid_out(name, t, layout);
  }

  // The same for a tensor of one of several dtypes.
  void tensor(const char* name, const Tensor& t, Types types, Sizes sizes,
              Layout layout) const {
    const ScalarType type = t.scalar_type();
    if (std::find(types.begin(), types.end(), type) == types.end()) {
      fail(name, ": expected another dtype than ", torch::headeronly::toString(type));
    }
    tensor(name, t, type, sizes, layout);
  }
  void tensor(const char* name, const OptionalTensor& t, Types types, Sizes sizes,
              Layout layout) const {
    if (t.has_value()) {
      tensor(name, *t, types, sizes, layout);
    }
  }

  // int64 numbers [N] on a CPU, each at least `from` and below `below`.
  void in_range(const char* name, const Tensor& t, int64_t from, int64_t below) const {
    const int64_t N = t.size(0), stride = t.stride(0);
    const auto* at = static_cast<const int64_t*>(t.data_ptr());
    bool holds = true;
    for (int64_t i = 0; i < N; ++i) {
      const int64_t v = at[i * stride];
      holds &= v >= from && v < below;
    }
    that(holds, name, ": expected indices from ", from, " to ", below - 1);
  }
  // int64 numbers [N] on a CPU: each of 0 to N - 1 once.
  void permutation(const char* name, const Tensor& t) const {
    const int64_t N = t.size(0), stride = t.stride(0);
    const auto* at = static_cast<const int64_t*>(t.data_ptr());
    std::vector<char> seen(N, 0);
    bool holds = true;
    for (int64_t i = 0; i < N; ++i) {
      const int64_t v = at[i * stride];
      const bool is_within = v >= 0 && v < N;
      char& mark = seen[is_within ? v : 0];
      holds &= is_within && mark == 0;
      mark = 1;
    }
    that(holds, name, ": expected each of 0 to ", N - 1, " once");
  }
  // int64 numbers on a CPU: from 0, never falling, up to `most`.
  void offsets(const char* name, const Tensor& t, int64_t most) const {
    const int64_t stride = t.stride(0), count = t.size(0);
    const auto* at = static_cast<const int64_t*>(t.data_ptr());
    bool holds = at[0] == 0 && at[(count - 1) * stride] <= most;
    for (int64_t k = 1; k < count; ++k) {
      holds &= at[(k - 1) * stride] <= at[k * stride];
    }
    that(holds, name, ": expected numbers from 0, never falling, to at most ", most);
  }

  // What is written shares no memory with anything else; null: not there.
  void apart(std::initializer_list<const Tensor*> written, std::initializer_list<const Tensor*> read) const {
    std::vector<Span> spans;
    spans.reserve(written.size() + read.size());
    for (const auto& list : {written, read}) {
      for (const Tensor* t : list) {
        spans.push_back(t == nullptr ? Span{0, 0} : span(*t));
      }
    }
    for (size_t i = 0; i < written.size(); ++i) {
      for (size_t k = i + 1; k < spans.size(); ++k) {
        that(std::max(spans[i].first, spans[k].first) >= std::min(spans[i].second, spans[k].second),
             "expected memory of its own for everything that is written");
      }
    }
  }

 private:
  using Span = std::pair<uintptr_t, uintptr_t>;  // the addresses of a tensor's numbers: from, to

  template <class... What>
  [[noreturn]] __attribute__((noinline, cold)) void fail(const What&... what) const {
    std::ostringstream message;
    message << op_ << ": ";
    (message << ... << what);
    throw std::runtime_error(message.str());
  }

  // What most checks ask of a tensor, asked once: each question is a call into torch, and a list may have hundreds.
  struct Form {
    int32_t dtype = 0;
    int64_t dim = 0;
    int64_t *sizes = nullptr, *strides = nullptr;

    explicit Form(const Tensor& t) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    }

    // How many numbers there are from the first to the last, those between included.
    int64_t extent() const {
      int64_t last = 0;
      for (int64_t d = 0; d < dim; ++d) {
        if (sizes[d] == 0) {
          return 0;
        }
        last += (sizes[d] - 1) * strides[d];
      }
      return last + 1;
    }
    int64_t bytes(int64_t count) const {
      return count * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    }
  };

  void placed(const char* name, const Tensor& t, const Form& form) const {
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    if (type != device_type_ || (index_ >= 0 && t.get_device_index() != index_)) {
      fail(name, ": expected all tensors on one device");
    }
    // Memory can be taken away under a tensor: sharding resizes storages.
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
    const int64_t count = form.extent();
    if (count > 0 && bytes < form.bytes(t.storage_offset() + count)) {
      fail(name, ": expected a tensor whose memory is there");
    }
  }

  void shape(const char* name, const Form& form, Sizes expected) const {
    bool holds = form.dim == static_cast<int64_t>(expected.size());
    for (int64_t k = 0; holds && k < form.dim; ++k) {
      const int64_t want = expected.begin()[k];
      holds = want == kAny || form.sizes[k] == want;
    }
    if (!holds) {
      std::ostringstream shapes;
      for (const int64_t want : expected) {
        want == kAny ? shapes << " any" : shapes << ' ' << want;
      }
      shapes << ", got";
      for (int64_t k = 0; k < form.dim; ++k) {
        shapes << ' ' << form.sizes[k];
      }
      fail(name, ": expected sizes", shapes.str());
    }
  }

  // Of no numbers any strides are good: contiguous() leaves them as they are.
  void laid_out(const char* name, const Tensor& t, Layout layout) const {
    if (t.numel() == 0) {
      return;
    }
    if (layout == Layout::kDense) {
      that(t.is_contiguous(), name, ": expected a contiguous tensor");
    } else if (layout == Layout::kRows) {
      const auto sizes = t.sizes();
      that(sizes.empty() || sizes.back() <= 1 || t.strides().back() == 1, name, ": expected a contiguous last axis");
    } else if (layout == Layout::kApart) {
      that(t.is_contiguous() || is_apart(t), name, ": expected every number in a place of its own");
    }
  }

  static bool is_apart(const Tensor& t) {
    std::vector<std::pair<int64_t, int64_t>> by_stride;
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (t.size(d) > 1) {
        by_stride.emplace_back(t.stride(d), t.size(d));
      }
    }
    std::sort(by_stride.begin(), by_stride.end());
    int64_t reached = 0;
    for (const auto& [stride, size] : by_stride) {
      if (stride <= reached) {
        return false;
      }
      reached += stride * (size - 1);
    }
    return true;
  }

  static Span span(const Tensor& t) {
    const Form form(t);
    const int64_t count = form.extent();
    const auto from = count == 0 ? 0 : reinterpret_cast<uintptr_t>(t.data_ptr());
    return {from, from + static_cast<uintptr_t>(form.bytes(count))};
  }

  const char* op_;
  int32_t device_type_, index_ = -1;
};

// What apart is told of an argument that may be missing.
inline const torch::stable::Tensor* if_given(const std::optional<torch::stable::Tensor>& t) {
  return t.has_value() ? &*t : nullptr;
}

}  // namespace fastroute

// Which channels take part in each sample, as the ops are told it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "common/task_mask_walk.h"

namespace fastroute::task_mask {

constexpr int64_t kThreadNumbers = 32768;  // worth waking a thread for

// Calls f with a number of this type, as it is stored.
template <class F>
void with_type(torch::headeronly::ScalarType type, const F& f) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(uint16_t());
    default: STD_TORCH_CHECK(false, "task_mask: expected float32, float64 or bfloat16");
  }
}

// The mapping [T, C] and the tasks: one for all, or one for each sample.
class Live {
 public:
  Live(const torch::stable::Tensor& mapping, const std::optional<torch::stable::Tensor>& tasks, int64_t task,
       const torch::stable::Tensor& x)
      : C_(x.size(1)), task_(task) {
    check_tasks(Check("task_mask"), mapping, tasks, task, x);
    mapping_ = static_cast<const float*>(mapping.data_ptr());
    T_ = mapping.size(0);
    if (tasks.has_value()) {
      tasks_ = static_cast<const int64_t*>(tasks->data_ptr());
      stride_ = tasks->dim() > 0 ? tasks->stride(0) : 0;
      if (tasks->dim() == 0) {
        task_ = *tasks_;
        tasks_ = nullptr;
      }
    }
  }

  bool is_shared() const { return tasks_ == nullptr; }
  // The sample's row of the mapping; null where its task does not exist: no channel takes part.
  const float* row(int64_t b) const {
    const int64_t t = tasks_ == nullptr ? task_ : tasks_[b * stride_];
    return t >= 0 && t < T_ ? mapping_ + t * C_ : nullptr;
  }

 private:
  const float* mapping_;
  const int64_t* tasks_ = nullptr;
  int64_t T_, C_, task_, stride_ = 0;
};

}  // namespace fastroute::task_mask

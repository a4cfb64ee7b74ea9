// How task_mask walks up to three tensors of one shape and any strides.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/check.h"

namespace fastroute::task_mask {

constexpr size_t kOperands = 3;  // what is written, what is read, and what decides

// The mapping [T, C] and the tasks of x [B, C, ...]: a number, a tensor of one, or one for each sample. In tensors any
// number may stand: where there is no such task, no channel takes part.
inline void check_tasks(const Check& check, const torch::stable::Tensor& mapping,
                        const std::optional<torch::stable::Tensor>& tasks, int64_t task,
                        const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  check.tensor("mapping", mapping, ScalarType::Float, {kAny, x.size(1)});
  const int64_t T = mapping.size(0);
  check.that(T >= 1 && (tasks.has_value() || (task >= 0 && task < T)), "task: expected 0 to ", T - 1, ", got ", task);
  if (tasks.has_value() && tasks->dim() == 0) {
    check.tensor("task", *tasks, ScalarType::Long, {});
  } else {
    check.tensor("task", tasks, ScalarType::Long, {x.size(0)}, Layout::kStrided);
  }
}

// What is read, of some dtype, and what decides, like it: at least two axes.
inline void check_operands(const Check& check, const torch::stable::Tensor& x, const torch::stable::Tensor* y,
                           Layout layout = Layout::kStrided) {
  check.that(x.dim() >= 2, "x: expected [B, C, ...], got ", x.dim(), " axes");
  check.like("x", x, x, layout);
  if (y != nullptr) {
    check.like("y", *y, x);
  }
}

struct Axis {
  int64_t size;
  std::array<int64_t, kOperands> strides;
};

// How up to three tensors of one shape are walked: [B, outer..., C, S], outer mostly empty.
struct Walk {
  Axis batch, channels, positions{1, {1, 1, 1}};
  std::vector<Axis> outer;
  int64_t outer_size = 1;

  explicit Walk(const std::array<const torch::stable::Tensor*, kOperands>& tensors) {
    const torch::stable::Tensor& first = *tensors[0];
    const auto axis = [&](int64_t dim) {
      Axis made{first.size(dim), {0, 0, 0}};
      for (size_t k = 0; k < kOperands; ++k) {
        made.strides[k] = tensors[k] == nullptr ? first.stride(dim) : tensors[k]->stride(dim);
      }
      return made;
    };
    batch = axis(0);
    channels = axis(1);
    for (int64_t dim = 2; dim < first.dim(); ++dim) {
      if (first.size(dim) != 1) {
        outer.push_back(axis(dim));
      }
    }
    std::stable_sort(outer.begin(), outer.end(), [](const Axis& a, const Axis& b) { return a.strides[0] > b.strides[0]; });
    for (size_t k = outer.size(); k-- > 1;) {  // axes that follow one another in memory are one
      const auto follows = [&](size_t t) { return outer[k - 1].strides[t] == outer[k].strides[t] * outer[k].size; };
      if (follows(0) && follows(1) && follows(2)) {
        outer[k - 1].size *= outer[k].size;
        outer[k - 1].strides = outer[k].strides;
        outer.erase(outer.begin() + static_cast<std::ptrdiff_t>(k));
      }
    }
    if (!outer.empty()) {
      positions = outer.back();
      outer.pop_back();
    }
    for (const Axis& a : outer) {
      outer_size *= a.size;
    }
  }

  // Where slab `at` of sample b begins, in numbers from each tensor's first.
  std::array<int64_t, kOperands> offsets(int64_t b, int64_t at) const {
    std::array<int64_t, kOperands> found;
    for (size_t k = 0; k < kOperands; ++k) {
      found[k] = b * batch.strides[k];
    }
    for (size_t d = outer.size(); d-- > 0;) {
      const int64_t i = at % outer[d].size;
      at /= outer[d].size;
      for (size_t k = 0; k < kOperands; ++k) {
        found[k] += i * outer[d].strides[k];
      }
    }
    return found;
  }

  static bool dense(const Axis& axis) {
    return axis.size == 1 || std::all_of(axis.strides.begin(), axis.strides.end(), [](int64_t s) { return s == 1; });
  }
  bool by_planes() const { return dense(positions) && positions.size > 1; }
  bool by_rows() const { return dense(channels); }
};

}  // namespace fastroute::task_mask

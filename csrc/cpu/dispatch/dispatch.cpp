// The plan of dispatch on a CPU: a stable counting sort. The contract is fastroute/ops/dispatch/reference.py.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/dispatch/dispatch.h"
#include "cpu/empty.h"

namespace fastroute {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> dispatch_plan(const Tensor& actions, int64_t modules) {
  const Check check("dispatch");
  check.tensor("actions", actions, ScalarType::Long, {kAny}, Layout::kStrided);
  check.that(modules >= 0 && modules <= kMaxModules, "modules: expected 0 to ", kMaxModules, ", got ", modules);
  const int64_t B = actions.size(0), stride = actions.stride(0);
  const auto* action = static_cast<const int64_t*>(actions.data_ptr());
  Tensor order = empty_cpu<1>({B}, ScalarType::Long), offsets = empty_cpu<1>({modules + 1}, ScalarType::Long);
  Tensor beyond = empty_cpu<1>({1}, ScalarType::Long);
  const auto module_of = [&](int64_t b) {
    const int64_t k = action[b * stride];
    return k >= 0 && k < modules ? k : modules;
  };

  std::vector<int64_t> next(modules + 1, 0);
  int64_t above = 0;
  for (int64_t b = 0; b < B; ++b) {
    ++next[module_of(b)];
    above += action[b * stride] >= modules;
  }
  auto* starts = static_cast<int64_t*>(offsets.data_ptr());
  int64_t start = 0;
  for (int64_t k = 0; k <= modules; ++k) {
    starts[k] = start;
    start += next[k];
    next[k] = starts[k];
  }
  auto* sorted = static_cast<int64_t*>(order.data_ptr());
  for (int64_t b = 0; b < B; ++b) {
    sorted[next[module_of(b)]++] = b;
  }
  *static_cast<int64_t*>(beyond.data_ptr()) = above;
  return {order, offsets, beyond};
}

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_dispatch_plan_native", TORCH_BOX(&dispatch_plan));
}

}  // namespace fastroute

// The plan of dispatch on a GPU in one launch, for few entries. The contract is fastroute/ops/dispatch/reference.py.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "common/check.h"
#include "common/dispatch_plan.h"

namespace fastroute {
namespace {

using torch::stable::Tensor;

constexpr unsigned kAll = 0xffffffffu;

struct Warp {
  __device__ int index() const { return threadIdx.x / kWarp; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
  template <class F>
  __device__ auto lanes(F&& f) const {
    return f(lane());
  }
  template <class F, class... T>
  __device__ void each(F&& f, const T&... of_lane) const {
    f(lane(), of_lane...);
  }
  __device__ uint32_t match(int key) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
    return __match_any_sync(kAll, key);
#else
    return 0;
#endif
  }
  __device__ int32_t scan(int32_t value) const {
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t other = __shfl_up_sync(kAll, value, step);
      value += lane() >= step ? other : 0;
    }
    return value;
  }
  __device__ int32_t last(int32_t value) const { return __shfl_sync(kAll, value, kWarp - 1); }
  __device__ int lowest(uint32_t lanes) const { return __ffs(lanes) - 1; }
  __device__ int count(uint32_t lanes) const { return __popc(lanes); }
  __device__ void sync() const { __syncwarp(); }
};

struct Block {
  __device__ int warps() const { return blockDim.x / kWarp; }
  template <class F>
  __device__ void each_thread(int n, F&& f) const {
    for (int i = threadIdx.x; i < n; i += blockDim.x) f(i);
  }
  template <class F>
  __device__ void each_warp(F&& f) const {
    Warp warp;
    f(warp);
  }
  __device__ void add(int32_t* to, int32_t value) const { atomicAdd(to, value); }
  __device__ void sync() const { __syncthreads(); }
};

__global__ void __launch_bounds__(1024) plan_kernel(PlanArguments arguments) {
  extern __shared__ int32_t scratch[];
  Block block;
  dispatch_plan(block, arguments, scratch);
}

std::tuple<Tensor, Tensor, Tensor> dispatch_plan_cuda(const Tensor& actions, int64_t modules) {
  const Check check = Check::on_gpu("dispatch", actions);
  check.tensor("actions", actions, torch::headeronly::ScalarType::Long, {kAny}, Layout::kStrided);
  const int64_t N = actions.size(0);
  check.that(N <= kPlanEntries && modules >= 0 && modules <= kPlanModules, "actions: expected at most ", kPlanEntries,
             " entries and 0 to ", kPlanModules, " modules, got ", N, " and ", modules);
  const int32_t device = actions.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor order = torch::stable::new_empty(actions, {N}), offsets = torch::stable::new_empty(actions, {modules + 1});
  Tensor beyond = torch::stable::new_empty(actions, {1});
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const PlanArguments arguments{static_cast<const int64_t*>(actions.data_ptr()), actions.stride(0),
                                static_cast<int>(N), static_cast<int>(modules),
                                static_cast<int64_t*>(order.data_ptr()), static_cast<int64_t*>(offsets.data_ptr()),
                                static_cast<int64_t*>(beyond.data_ptr())};
  const int warps = plan_warps(N, modules);
  plan_kernel<<<1, warps * kWarp, plan_shared_bytes(warps, modules), static_cast<cudaStream_t>(stream)>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {order, offsets, beyond};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CUDA, library) {
  library.impl("_dispatch_plan_native", TORCH_BOX(&dispatch_plan_cuda));
}

}  // namespace fastroute

// task_mask on a GPU without Triton: 16-byte accesses, dead channels written without being read, masks as bits where
// channels are dense. The contract is fastroute/ops/task_mask/reference.py.
//
// Axes: B samples, C channels, S positions: the axes after the channels that can be walked as one.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "common/task_mask_walk.h"

namespace fastroute::task_mask {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kMaxOuter = 6;
constexpr int64_t kMaxBlocks = 0x7fffffff;
constexpr int64_t kRowsPerBlock = 32;
constexpr int64_t kMaxBits = 48 * 1024 / 4;  // words of shared memory: 393,216 channels

// A Walk as a kernel takes it.
struct Way {
  int64_t B, C, S, outer_size;
  int64_t batch[3], channels[3], positions[3];
  int outer;
  int64_t outer_sizes[kMaxOuter], outer_strides[kMaxOuter][3];

  __device__ int64_t offset(int k, int64_t b, int64_t at) const {
    int64_t found = b * batch[k];
    for (int d = outer; d-- > 0;) {
      found += (at % outer_sizes[d]) * outer_strides[d][k];
      at /= outer_sizes[d];
    }
    return found;
  }
};

// The mapping [T, C], and the task of all or of each sample.
struct Rows {
  const float* mapping;
  const int64_t* tasks;
  int64_t task, stride, T, C;

  // Null where the task does not exist: no channel takes part, nothing is read out of bounds.
  __device__ const float* of(int64_t b) const {
    const int64_t t = tasks == nullptr ? task : tasks[b * stride];
    return t >= 0 && t < T ? mapping + t * C : nullptr;
  }
};

// What becomes of a number in a live channel.
enum class What { kKeep, kRelu, kGate };

template <What what, class S>
__device__ S changed(S x, S y) {
  if constexpr (what == What::kKeep) {
    return x;
  } else if constexpr (what == What::kRelu) {
    return static_cast<float>(x) < 0.0f ? S(0.0f) : x;
  } else {
    return static_cast<float>(y) <= 0.0f ? S(0.0f) : x;
  }
}
template <What what>
__device__ double changed(double x, double y) {
  return what == What::kRelu ? (x < 0.0 ? 0.0 : x) : what == What::kGate ? (y <= 0.0 ? 0.0 : x) : x;
}

// As many numbers as one access moves: 16 bytes, or one number where addresses are not aligned to that.
template <class S, int count>
struct alignas(sizeof(S) * count) Pack {
  S v[count];
};

template <What what, class S, int count>
__device__ void change(S* out, const S* x, const S* y) {
  Pack<S, count> a = *reinterpret_cast<const Pack<S, count>*>(x), b = a;
  if constexpr (what == What::kGate) {
    b = *reinterpret_cast<const Pack<S, count>*>(y);
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    a.v[i] = changed<what>(a.v[i], b.v[i]);
  }
  *reinterpret_cast<Pack<S, count>*>(out) = a;
}

template <class S, int count>
__device__ void clear(S* out) {
  Pack<S, count> zero;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    zero.v[i] = S(0.0f);
  }
  *reinterpret_cast<Pack<S, count>*>(out) = zero;
}

// Dense positions: a group of `lanes` threads has a plane. in_place: live planes of kKeep are not touched.
template <What what, class S, int count, int lanes>
__global__ void planes(S* out, const S* x, const S* y, Way way, Rows rows, bool in_place) {
  const int64_t total = way.B * way.outer_size * way.C;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (kThreads / lanes);
  for (int64_t plane = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes; plane < total;
       plane += groups) {
    const int64_t slab = plane / way.C, c = plane - slab * way.C;
    const int64_t b = slab / way.outer_size, at = slab - b * way.outer_size;
    const float* row = rows.of(b);
    const bool live = row != nullptr && row[c] != 0.0f;
    if (live && what == What::kKeep && in_place) {
      continue;
    }
    S* to = out + way.offset(0, b, at) + c * way.channels[0];
    const S* from = x + way.offset(1, b, at) + c * way.channels[1];
    const S* decides = y + way.offset(2, b, at) + c * way.channels[2];
    for (int64_t s = static_cast<int64_t>(threadIdx.x % lanes) * count; s < way.S; s += lanes * count) {
      if (live) {
        change<what, S, count>(to + s, from + s, decides + s);
      } else {
        clear<S, count>(to + s);
      }
    }
  }
}

// Dense channels: a block has rows of one sample, and that sample's mask as bits.
template <What what, class S, int count>
__global__ void channel_rows(S* out, const S* x, const S* y, Way way, Rows rows) {
  extern __shared__ uint32_t bits[];
  const int64_t parts = (way.S + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t slab = blockIdx.x / parts, first = (blockIdx.x - slab * parts) * kRowsPerBlock;
  const int64_t b = slab / way.outer_size, at = slab - b * way.outer_size;
  const float* row = rows.of(b);
  const int64_t padded = (way.C + kWarp - 1) / kWarp * kWarp;
  for (int64_t c = threadIdx.x; c < padded; c += kThreads) {  // whole warps: kThreads is a multiple of them
    const uint32_t word = __ballot_sync(0xffffffffu, row != nullptr && c < way.C && row[c] != 0.0f);
    if (c % kWarp == 0) {
      bits[c / kWarp] = word;
    }
  }
  __syncthreads();
  const int64_t vectors = way.C / count, last = min(way.S, first + kRowsPerBlock);
  for (int64_t i = threadIdx.x; i < vectors * (last - first); i += kThreads) {
    const int64_t s = first + i / vectors, c = (i % vectors) * count;
    const uint32_t mine = bits[c / kWarp] >> (c % kWarp);  // count divides a warp's 32
    S* to = out + way.offset(0, b, at) + s * way.positions[0] + c;
    if ((mine & ((1u << count) - 1)) == 0) {
      clear<S, count>(to);
      continue;
    }
    const S* from = x + way.offset(1, b, at) + s * way.positions[1] + c;
    const S* decides = y + way.offset(2, b, at) + s * way.positions[2] + c;
    Pack<S, count> v = *reinterpret_cast<const Pack<S, count>*>(from), w = v;
    if constexpr (what == What::kGate) {
      w = *reinterpret_cast<const Pack<S, count>*>(decides);
    }
#pragma unroll
    for (int k = 0; k < count; ++k) {
      v.v[k] = (mine >> k) & 1 ? changed<what>(v.v[k], w.v[k]) : S(0.0f);
    }
    *reinterpret_cast<Pack<S, count>*>(to) = v;
  }
}

// Neither axis dense in all tensors: number by number.
template <What what, class S>
__global__ void scattered(S* out, const S* x, const S* y, Way way, Rows rows) {
  const int64_t total = way.B * way.outer_size * way.C * way.S;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t plane = i / way.S, s = i - plane * way.S, slab = plane / way.C, c = plane - slab * way.C;
    const int64_t b = slab / way.outer_size, at = slab - b * way.outer_size;
    const auto where = [&](int k) {
      return way.offset(k, b, at) + c * way.channels[k] + s * way.positions[k];
    };
    const float* row = rows.of(b);
    const bool live = row != nullptr && row[c] != 0.0f;
    if (live) {
      change<what, S, 1>(out + where(0), x + where(1), y + where(2));
    } else {
      out[where(0)] = S(0.0f);
    }
  }
}

template <class S>
bool aligned(const Walk& walk, const std::array<const void*, 3>& data, bool by_rows) {
  constexpr int64_t count = 16 / static_cast<int64_t>(sizeof(S));
  bool whole = (by_rows ? walk.channels.size : walk.positions.size) % count == 0;
  for (size_t k = 0; k < 3; ++k) {
    whole = whole && reinterpret_cast<uintptr_t>(data[k]) % 16 == 0 && walk.batch.strides[k] % count == 0;
    whole = whole && (by_rows ? walk.positions : walk.channels).strides[k] % count == 0;
    for (const Axis& a : walk.outer) {
      whole = whole && a.strides[k] % count == 0;
    }
  }
  return whole;
}

int blocks(int64_t wanted) {
  return static_cast<int>(std::min(kMaxBlocks, std::max<int64_t>(1, wanted)));
}

template <What what, class S>
void launch(S* out, const S* x, const S* y, const Walk& walk, const Way& way, const Rows& rows, cudaStream_t stream) {
  constexpr int count = 16 / static_cast<int>(sizeof(S));
  const int64_t slabs = way.B * way.outer_size, parts = (way.S + kRowsPerBlock - 1) / kRowsPerBlock;
  const bool by_rows = walk.by_rows() && (way.C + kWarp - 1) / kWarp <= kMaxBits && slabs * parts <= kMaxBlocks;
  const bool wide = aligned<S>(walk, {out, x, y}, !walk.by_planes());
  if (walk.by_planes()) {
    const auto go = [&](auto kernel, int lanes) {
      const int64_t per_block = kThreads / lanes;
      kernel<<<blocks((slabs * way.C + per_block - 1) / per_block), kThreads, 0, stream>>>(out, x, y, way, rows, out == x);
    };
    const bool large = way.S * static_cast<int64_t>(sizeof(S)) > 2048;
    if (wide) {
      large ? go(planes<what, S, count, kThreads>, kThreads) : go(planes<what, S, count, kWarp>, kWarp);
    } else {
      large ? go(planes<what, S, 1, kThreads>, kThreads) : go(planes<what, S, 1, kWarp>, kWarp);
    }
  } else if (by_rows) {
    const size_t shared = static_cast<size_t>((way.C + kWarp - 1) / kWarp) * sizeof(uint32_t);
    const auto kernel = wide ? channel_rows<what, S, count> : channel_rows<what, S, 1>;
    kernel<<<blocks(slabs * parts), kThreads, shared, stream>>>(out, x, y, way, rows);
  } else {
    const int64_t numbers = slabs * way.C * way.S;
    scattered<what, S><<<blocks((numbers + kThreads - 1) / kThreads), kThreads, 0, stream>>>(out, x, y, way, rows);
  }
}

void run(const Tensor& out, const Tensor& x, const Tensor* y, const Tensor& mapping, const OptionalTensor& tasks,
         int64_t task, bool relu) {
  const Check check = Check::on_gpu("task_mask", out);
  check_operands(check, x, y, out.data_ptr() == x.data_ptr() ? Layout::kApart : Layout::kStrided);
  check_tasks(check, mapping, tasks, task, x);
  if (out.numel() == 0) {
    return;
  }
  const Walk walk({&out, &x, y});
  Way way{walk.batch.size, walk.channels.size, walk.positions.size, walk.outer_size};
  way.outer = static_cast<int>(walk.outer.size());
  STD_TORCH_CHECK(way.outer <= kMaxOuter, "x: expected fewer axes, got ", out.dim());
  for (int k = 0; k < 3; ++k) {
    way.batch[k] = walk.batch.strides[k];
    way.channels[k] = walk.channels.strides[k];
    way.positions[k] = walk.positions.strides[k];
    for (int d = 0; d < way.outer; ++d) {
      way.outer_sizes[d] = walk.outer[d].size;
      way.outer_strides[d][k] = walk.outer[d].strides[k];
    }
  }
  Rows rows{static_cast<const float*>(mapping.data_ptr()), nullptr, task, 0, mapping.size(0), way.C};
  if (tasks.has_value()) {
    rows.tasks = static_cast<const int64_t*>(tasks->data_ptr());
    rows.stride = tasks->dim() > 0 ? tasks->stride(0) : 0;
  }
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(out.get_device_index(), &stream));
  const auto with = [&](auto zero) {
    using S = decltype(zero);
    auto* to = static_cast<S*>(out.data_ptr());
    const auto* from = static_cast<const S*>(x.data_ptr());
    const auto* decides = y == nullptr ? from : static_cast<const S*>(y->data_ptr());
    const auto at = static_cast<cudaStream_t>(stream);
    if (y != nullptr) {
      launch<What::kGate>(to, from, decides, walk, way, rows, at);
    } else if (relu) {
      launch<What::kRelu>(to, from, decides, walk, way, rows, at);
    } else {
      launch<What::kKeep>(to, from, decides, walk, way, rows, at);
    }
  };
  switch (out.scalar_type()) {
    case ScalarType::Float: with(float()); break;
    case ScalarType::Double: with(double()); break;
    case ScalarType::BFloat16: with(__nv_bfloat16()); break;
    case ScalarType::Half: with(__half()); break;
    default: STD_TORCH_CHECK(false, "task_mask: expected a floating dtype of at most 64 bits");
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "task_mask: ", cudaGetErrorString(error));
}

Tensor gate_cuda(const Tensor& g, const OptionalTensor& y, const Tensor& mapping, const OptionalTensor& tasks, int64_t task) {
  Tensor out = torch::stable::empty_like(g);
  run(out, g, y.has_value() ? &*y : nullptr, mapping, tasks, task, false);
  return out;
}

Tensor rectify_cuda(const Tensor& x, const Tensor& mapping, const OptionalTensor& tasks, int64_t task) {
  Tensor out = torch::stable::empty_like(x);
  run(out, x, nullptr, mapping, tasks, task, true);
  return out;
}

void mask_cuda(Tensor x, const Tensor& mapping, const OptionalTensor& tasks, int64_t task, bool relu) {
  run(x, x, nullptr, mapping, tasks, task, relu);
}

}  // namespace
}  // namespace fastroute::task_mask

STABLE_TORCH_LIBRARY_IMPL(fastroute, CUDA, library) {
  library.impl("_task_mask_gate_native", TORCH_BOX(&fastroute::task_mask::gate_cuda));
  library.impl("_task_mask_rectify_native", TORCH_BOX(&fastroute::task_mask::rectify_cuda));
  library.impl("_task_mask_mask__native", TORCH_BOX(&fastroute::task_mask::mask_cuda));
}

// Fresh CPU tensors: without a trip through the dispatcher, which small ops are made of, and large ones on huge pages. A
// large block comes from the kernel anew each time, and touching it page by page costs several times what writing it does;
// with huge pages it is one fault for each 2 MiB. Where memory is in pieces the kernel first moves them together: the
// gradient of 100,000 x 256 inputs, which had it, gained 15 % in a process of its own and lost 37 % among rivals.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastroute {

constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kHugeBytes = 16 * kHugePage;  // glibc maps blocks from here on one by one; less comes from its heap

// Advice only, about memory that nobody has written yet: a kernel that cannot follow it changes nothing.
inline void advise_huge_pages([[maybe_unused]] const torch::stable::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto bytes = static_cast<int64_t>(fresh.numel() * fresh.element_size());
  if (bytes >= kHugeBytes) {
    const auto from = (reinterpret_cast<uintptr_t>(fresh.data_ptr()) + kHugePage - 1) / kHugePage * kHugePage;
    const auto to = (reinterpret_cast<uintptr_t>(fresh.data_ptr()) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // NOLINT: it may fail
  }
#endif
}

template <size_t dims>
torch::stable::Tensor empty_cpu(const std::array<int64_t, dims>& sizes, torch::headeronly::ScalarType type) {
  std::array<int64_t, dims> strides;
  int64_t stride = 1;
  for (size_t k = dims; k-- > 0;) {
    strides[k] = stride;
    stride *= sizes[k] > 1 ? sizes[k] : 1;
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor empty_like_cpu(const torch::stable::Tensor& x) {
  torch::stable::Tensor made = torch::stable::empty_like(x);
  advise_huge_pages(made);
  return made;
}

}  // namespace fastroute

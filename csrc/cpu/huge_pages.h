// Large results on huge pages. A large block comes from the kernel anew each time, and touching it page by page
// costs several times what writing it does; with huge pages it is one fault for each 2 MiB.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

inline torch::stable::Tensor empty_like_on_huge_pages(const torch::stable::Tensor& x) {
  torch::stable::Tensor made = torch::stable::empty_like(x);
  advise_huge_pages(made);
  return made;
}

}  // namespace fastroute

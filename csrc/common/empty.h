// Fresh CPU tensors without a trip through the dispatcher: small ops are made of such trips.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>

namespace fastroute {

template <size_t dims>
torch::stable::Tensor empty_cpu(const std::array<int64_t, dims>& sizes, torch::headeronly::ScalarType type) {
  std::array<int64_t, dims> strides;
  int64_t stride = 1;
  for (size_t k = dims; k-- > 0;) {
    strides[k] = stride;
    stride *= sizes[k] > 1 ? sizes[k] : 1;
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

}  // namespace fastroute

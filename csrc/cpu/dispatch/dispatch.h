// The plan of dispatch, for ops that make their own.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace fastroute {

// (order [B], offsets [modules + 1], beyond [1]) of actions [B], int64.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> dispatch_plan(
    const torch::stable::Tensor& actions, int64_t modules);

}  // namespace fastroute

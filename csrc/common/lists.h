// Lists of tensors that may be absent, which says the same as an empty list. AOTInductor's packages pass None for a list
// without tensors, so schemas say Tensor[]? for every list.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>
#include <vector>

namespace fastroute {

using Tensors = std::vector<torch::stable::Tensor>;

template <class T>
const T& present(const T& given) {
  return given;
}
inline const Tensors& present(const std::optional<Tensors>& given) {
  static const Tensors none;
  return given.has_value() ? *given : none;
}

template <class Argument, class T = std::remove_cvref_t<Argument>>
using Passed = std::conditional_t<std::is_same_v<T, Tensors>, std::optional<Tensors>, T>;

// `call` is `op` for TORCH_BOX, under a schema with Tensor[]?.
template <auto op>
struct WithLists;
template <class R, class... Arguments, R (*op)(Arguments...)>
struct WithLists<op> {
  static R call(const Passed<Arguments>&... given) { return op(present(given)...); }
};

}  // namespace fastroute

// policy for other ops, and what it needs of rows.inc: functions over tiles of rows, dense [rows, K] in the dtype
// of sums.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace fastroute::policy {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The contract is fastroute/ops/policy/reference.py; `kind` is a Kind.
std::tuple<Tensor, Tensor, Tensor> forward_op(
    const Tensor& scores, const OptionalTensor& uniform, const OptionalTensor& coin, const OptionalTensor& forced,
    int64_t kind, double temperature, double exploration);
// The gradient of dense scores from that of the value and, in `also`, what else comes to them, dense.
Tensor gradient(
    const OptionalTensor& grad, const OptionalTensor& also, const Tensor& scores, const Tensor& actions, int64_t kind,
    double temperature);

// Indices into fastroute.ops.policy.contract.KINDS.
enum Kind : int64_t { kSoftmax, kScore, kShifted };

template <class T>
struct Functions {
  // at[i]: the first largest of row i, or its first NaN
  void (*argmax)(int64_t* at, const T* v, int64_t rows, int64_t K);
  void (*divide)(T* v, T by, int64_t count);
  // uniform numbers, with E = -log of them, become what the largest wins with: z / temperature - log E, or
  // (z - min z + shift) / E
  void (*race_softmax)(T* race, const T* z, int64_t count);
  void (*race_shifted)(T* race, const T* z, int64_t rows, int64_t K);
  // the log-probability of each row's action, or its score, 0 where it is negative; z may be overwritten
  void (*value[3])(T* value, T* z, const int64_t* actions, int64_t rows, int64_t K);
  // z becomes its gradient, 0 where the action is negative
  void (*gradient[3])(T* z, const T* grad, const int64_t* actions, T temperature, int64_t rows, int64_t K);
};

// The functions for this processor, chosen once.
template <class T>
const Functions<T>& rows();
extern template const Functions<float>& rows<float>();
extern template const Functions<double>& rows<double>();

}  // namespace fastroute::policy

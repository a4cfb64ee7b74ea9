// agent_policy on a CPU: grouped_linear and policy one after the other, without an operator between them. The contract is
// fastroute/ops/agent_policy/reference.py.
//
// Axes: N rows, A agents, F features in, K choices, C outputs of the critic (K, or 1).

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/check.h"
#include "common/lists.h"
#include "cpu/empty.h"
#include "cpu/grouped_linear/grouped_linear.h"
#include "cpu/policy/policy.h"

namespace fastroute::agent_policy {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr double kShift = 1e-6;  // of fastroute.ops.policy.reference.shifted

// Calls f with a number of this type, and one of the type that its sums are made in.
template <class F>
void with_types(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float(), float());
    case ScalarType::Double: return f(double(), double());
    case ScalarType::BFloat16: return f(BFloat16(), float());
    default: STD_TORCH_CHECK(false, "agent_policy: expected float32, float64 or bfloat16");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
T* data(Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
const T* data(const OptionalTensor& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

// Both parts of a plan, or neither. What is in them is for grouped_linear to check.
void check_plan(const Check& check, const OptionalTensor& order, const OptionalTensor& offsets) {
  check.that(order.has_value() == offsets.has_value(), "order: expected with offsets, or neither");
  check.tensor("order", order, ScalarType::Long, {kAny}, Layout::kStrided);
}

// Of a plan, or of one agent that has all rows.
Tensor offsets_or(const OptionalTensor& offsets, int64_t N) {
  if (offsets.has_value()) {
    return *offsets;
  }
  Tensor made = empty_cpu<1>({2}, ScalarType::Long);
  data<int64_t>(made)[0] = 0;
  data<int64_t>(made)[1] = N;
  return made;
}

// at[i] = critic[i][action], 0 where it is negative, or a state's only value
template <class S, class T>
void take(T* at, const S* critic, const int64_t* actions, int64_t N, int64_t C) {
  for (int64_t i = 0; i < N; ++i) {
    at[i] = C > 1 && actions[i] < 0 ? T(0) : static_cast<T>(critic[i * C + (C > 1 ? actions[i] : 0)]);
  }
}

// mean[i] = sum_k p_k critic[i][k]
template <class S, class T>
void expect(T* mean, const S* scores, const S* critic, int64_t N, int64_t K, int64_t kind, double temperature) {
  for (int64_t i = 0; i < N; ++i, scores += K, critic += K) {
    T extreme = static_cast<T>(scores[0]);
    for (int64_t k = 1; k < K; ++k) {
      const T z = static_cast<T>(scores[k]);
      extreme = kind == policy::kShifted ? std::min(extreme, z) : std::max(extreme, z);
    }
    double total = 0, sum = 0;  // what learns from it subtracts it from a number of its size
    for (int64_t k = 0; k < K; ++k) {
      const T from = static_cast<T>(scores[k]) - extreme;
      const T weight =
          kind == policy::kShifted ? from + static_cast<T>(kShift) : std::exp(from / static_cast<T>(temperature));
      total += weight;
      sum += static_cast<double>(weight) * static_cast<double>(static_cast<T>(critic[k]));
    }
    mean[i] = static_cast<T>(sum / total);
  }
}

Tensors forward_op(
    const OptionalTensor& x, const OptionalTensor& order, const OptionalTensor& offsets, const Tensors& weights,
    const Tensors& biases, const Tensors& critic_weights, const Tensors& critic_biases, const OptionalTensor& uniform,
    const OptionalTensor& coin, const OptionalTensor& forced, int64_t kind, double temperature, double exploration,
    bool expected) {
  const Check check("agent_policy");
  check_plan(check, order, offsets);
  check.that(x.has_value() || order.has_value(), "x: nothing tells the number of rows");
  const int64_t N = order.has_value() ? order->size(0) : x->size(0);
  const Tensor starts = offsets_or(offsets, N);
  const Tensor& source = x.has_value() ? *x : starts;
  Tensor scores = std::get<0>(
      grouped_linear::forward_op(source, order, order, starts, weights, biases, 0, false));
  auto [actions, value, greedy] = policy::forward_op(scores, uniform, coin, forced, kind, temperature, exploration);
  const bool has_critic = !critic_weights.empty() || !critic_biases.empty();
  Tensors made;
  Tensor critic = scores;
  if (has_critic) {
    critic = std::get<0>(
        grouped_linear::forward_op(source, order, order, starts, critic_weights, critic_biases, 0, false));
  }
  const int64_t K = scores.size(1), C = critic.size(1);
  check.that(!has_critic || C == K || (C == 1 && !expected), "critic: expected ", K, " outputs, or 1, got ", C);
  check.that(has_critic || !expected, "expected: expected a critic");
  check.that(kind != policy::kScore || !expected, "expected: scores have no probabilities");
  Tensor at = empty_cpu<1>({has_critic ? N : 0}, value.scalar_type());
  Tensor mean = empty_cpu<1>({expected ? N : 0}, value.scalar_type());
  with_types(scores.scalar_type(), [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    auto* action = data<int64_t>(actions);
    if (order.has_value()) {  // what the plan drops decides nothing
      const auto* starts_of = data<int64_t>(starts);
      const auto* row = data<int64_t>(*order);
      for (int64_t i = starts_of[(starts.size(0) - 1) * starts.stride(0)]; i < N; ++i) {
        const int64_t b = row[i * order->stride(0)];
        action[b] = forced.has_value() ? action[b] : 0;
        data<T>(value)[b] = 0;
      }
    }
    if (has_critic) {
      take(data<T>(at), data<S>(std::as_const(critic)), action, N, C);
    }
    if (expected) {
      expect(data<T>(mean), data<S>(std::as_const(scores)), data<S>(std::as_const(critic)), N, K, kind, temperature);
    }
  });
  made = {std::move(actions), std::move(value), std::move(greedy), std::move(scores)};
  if (has_critic) {
    made.push_back(std::move(critic));
    made.push_back(std::move(at));
  }
  if (expected) {
    made.push_back(std::move(mean));
  }
  return made;
}

// The gradient of the critic's outputs.
Tensor critic_gradient(
    const OptionalTensor& grad, const OptionalTensor& grad_at, const Tensor& actions, int64_t C, ScalarType type) {
  const int64_t N = actions.size(0);
  Tensor made = empty_cpu<2>({N, C}, type);
  with_types(type, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    auto* out = data<S>(made);
    const auto* from = data<S>(grad);
    const auto* at = data<T>(grad_at);
    const auto* action = data<int64_t>(actions);
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t c = 0; c < C; ++c) {
        const bool is_taken = at != nullptr && (C == 1 || c == action[i]);
        out[i * C + c] = static_cast<S>(
            (from == nullptr ? T(0) : static_cast<T>(from[i * C + c])) + (is_taken ? at[i] : T(0)));
      }
    }
  });
  return made;
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors> backward_op(
    const OptionalTensor& grad_value, const OptionalTensor& grad_scores, const OptionalTensor& grad_critic,
    const OptionalTensor& grad_critic_at, const Tensor& scores, const Tensor& actions, const OptionalTensor& x,
    const OptionalTensor& order, const OptionalTensor& offsets, const Tensors& weights, const Tensors& critic_weights,
    int64_t agents, int64_t critic_width, int64_t kind, double temperature, bool want_x, bool want_weights,
    bool want_biases, bool want_critic_weights, bool want_critic_biases, bool stacked, bool critic_stacked,
    bool keep_empty) {
  const Check check("agent_policy");
  check_plan(check, order, offsets);
  check.tensor("scores", scores, kFloats, {kAny, kAny}, Layout::kStrided);
  const int64_t N = scores.size(0), C = critic_width;
  const ScalarType type = scores.scalar_type();
  check.that(C == 0 || C == 1 || C == scores.size(1), "critic_width: expected that of scores, 1 or 0, got ", C);
  check.tensor("actions", actions, ScalarType::Long, {N});
  check.tensor("grad_critic", grad_critic, type, {N, C});
  check.tensor("grad_critic_at", grad_critic_at, type == ScalarType::Double ? type : ScalarType::Float, {N});
  const Tensor starts = offsets_or(offsets, N);
  const Tensor& source = x.has_value() ? *x : starts;
  const auto back = [&](const Tensor& grad, const Tensors& w, bool x_too, bool w_too, bool b_too, bool is_stacked) {
    return grouped_linear::backward_op(
        grad, source, order, order, order, starts, w, agents, x_too && !w.empty(), w_too, b_too, 0, {}, is_stacked,
        keep_empty || is_stacked);
  };
  Tensor dx = empty_cpu<1>({0}, scores.scalar_type());
  Tensors dw, db, critic_dw, critic_db;
  bool has_x = false;
  if (grad_value.has_value() || grad_scores.has_value()) {
    const Tensor grad = policy::gradient(grad_value, grad_scores, scores, actions, kind, temperature);
    Tensor made;
    std::tie(made, dw, db) = back(grad, weights, want_x, want_weights, want_biases, stacked);
    if (want_x && !weights.empty()) {
      dx = std::move(made);
      has_x = true;
    }
  }
  if (grad_critic.has_value() || grad_critic_at.has_value()) {
    const Tensor grad = critic_gradient(grad_critic, grad_critic_at, actions, C, type);
    Tensor made;
    std::tie(made, critic_dw, critic_db) =
        back(grad, critic_weights, want_x, want_critic_weights, want_critic_biases, critic_stacked);
    if (want_x && !critic_weights.empty()) {
      if (has_x) {
        with_types(scores.scalar_type(), [&](auto s, auto t) {
          using S = decltype(s);
          using T = decltype(t);
          const auto* more = data<S>(std::as_const(made));
          auto* to = data<S>(dx);
          for (int64_t i = 0; i < dx.numel(); ++i) {
            to[i] = static_cast<S>(static_cast<T>(to[i]) + static_cast<T>(more[i]));
          }
        });
      } else {
        dx = std::move(made);
      }
    }
  }
  return {std::move(dx), std::move(dw), std::move(db), std::move(critic_dw), std::move(critic_db)};
}

}  // namespace
}  // namespace fastroute::agent_policy

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  using namespace fastroute;
  library.impl("_agent_policy_native", TORCH_BOX(&WithLists<agent_policy::forward_op>::call));
  library.impl("_agent_policy_native_backward", TORCH_BOX(&WithLists<agent_policy::backward_op>::call));
}

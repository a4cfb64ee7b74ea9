// The hidden layer of feed-forward experts on a CPU, one pass over what the first product gave. The contract is
// fastroute/ops/expert_ffn/plain.py.
//
// Axes: N entries, H hidden features; u is [N, 2 H], the gate's before the other ones, or [N, H].

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/check.h"
#include "common/isa.h"
#include "cpu/activation.h"
#include "cpu/empty.h"

namespace fastroute::expert_ffn {

// S is the type in memory, uint16_t for bfloat16; T that of weights and sums.
template <class S, class T = std::conditional_t<std::is_same_v<S, uint16_t>, float, S>>
struct Gated {
  // h = weight act(u) (gated: times the other half), of so many rows; weights may be null
  void (*forward[activation::kKinds])(S* h, const S* u, const T* weights, int64_t rows, int64_t H);
  // the gradients of u and of the weights, either null, from t, that of what is weighted
  void (*backward[activation::kKinds])(
      S* du, T* dweights, const S* t, const S* u, const T* weights, int64_t rows, int64_t H);
};
template <class S>
struct Rows {
  Gated<S> gated[2];
};

#define FASTROUTE_EACH_ISA "cpu/expert_ffn/hidden.inc"
#include "common/each_isa.inc"

FASTROUTE_TABLE(Rows, rows, make)
template const Rows<uint16_t>& rows<uint16_t>();

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kThreadNumbers = 1 << 15;  // that a thread is worth waking for

template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float(), float());
    case ScalarType::Double: return f(double(), double());
    default: return f(uint16_t(), float());
  }
}

struct Sizes {
  int64_t N, H;
  ScalarType type, sums;

  Sizes(const Check& check, const Tensor& u, const OptionalTensor& weights, int64_t kind, bool gated) {
    check.tensor("u", u, kFloats, {kAny, kAny}, Layout::kDense);
    N = u.size(0);
    check.that(!gated || u.size(1) % 2 == 0, "u: expected [N, 2 H] of gated experts, got ", u.size(1), " columns");
    H = gated ? u.size(1) / 2 : u.size(1);
    type = u.scalar_type();
    sums = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check.tensor("weights", weights, sums, {N});
    check.that(kind >= 0 && kind < activation::kKinds, "activation: there is none of number ", kind);
  }

  template <class F>
  void each_rows(const F& f) const {
    if (N * H < 2 * kThreadNumbers) {
      f(0, N);
    } else {
      torch::stable::parallel_for(0, N, std::max<int64_t>(1, kThreadNumbers / H), f);
    }
  }
};

Tensor forward_op(const Tensor& u, const OptionalTensor& weights, int64_t kind, bool gated) {
  const Sizes s(Check("expert_ffn"), u, weights, kind, gated);
  Tensor h = empty_cpu<2>({s.N, s.H}, s.type);
  with_type(s.type, [&](auto stored, auto summed) {
    using S = decltype(stored);
    using T = decltype(summed);
    auto* to = static_cast<S*>(h.data_ptr());
    const auto* from = static_cast<const S*>(u.data_ptr());
    const auto* w = weights.has_value() ? static_cast<const T*>(weights->data_ptr()) : nullptr;
    const auto run = rows<S>().gated[gated].forward[kind];
    s.each_rows([&](int64_t begin, int64_t end) {
      run(to + begin * s.H, from + begin * (gated ? 2 : 1) * s.H, w == nullptr ? w : w + begin, end - begin, s.H);
    });
  });
  return h;
}

std::tuple<Tensor, Tensor> backward_op(
    const Tensor& t, const Tensor& u, const OptionalTensor& weights, int64_t kind, bool gated, bool want_u,
    bool want_weights) {
  const Check check("expert_ffn");
  const Sizes s(check, u, weights, kind, gated);
  check.tensor("t", t, s.type, {s.N, s.H});
  const int64_t wide = gated ? 2 * s.H : s.H;
  Tensor du = want_u ? empty_cpu<2>({s.N, wide}, s.type) : empty_cpu<1>({0}, s.type);
  Tensor dweights = empty_cpu<1>({want_weights ? s.N : 0}, s.sums);
  with_type(s.type, [&](auto stored, auto summed) {
    using S = decltype(stored);
    using T = decltype(summed);
    auto* to_u = want_u ? static_cast<S*>(du.data_ptr()) : nullptr;
    auto* to_weights = want_weights ? static_cast<T*>(dweights.data_ptr()) : nullptr;
    const auto *from_t = static_cast<const S*>(t.data_ptr()), *from_u = static_cast<const S*>(u.data_ptr());
    const auto* w = weights.has_value() ? static_cast<const T*>(weights->data_ptr()) : nullptr;
    const auto run = rows<S>().gated[gated].backward[kind];
    s.each_rows([&](int64_t begin, int64_t end) {
      run(to_u == nullptr ? to_u : to_u + begin * wide, to_weights == nullptr ? to_weights : to_weights + begin,
          from_t + begin * s.H, from_u + begin * wide, w == nullptr ? w : w + begin, end - begin, s.H);
    });
  });
  return {std::move(du), std::move(dweights)};
}

}  // namespace
}  // namespace fastroute::expert_ffn

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  using namespace fastroute::expert_ffn;
  library.impl("_expert_ffn_native_hidden", TORCH_BOX(&forward_op));
  library.impl("_expert_ffn_native_hidden_backward", TORCH_BOX(&backward_op));
}

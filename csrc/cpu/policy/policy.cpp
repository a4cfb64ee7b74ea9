// policy on a CPU, in tiles of rows. The contract is fastroute/ops/policy/reference.py.
//
// Axes: N rows, K choices.

#include "cpu/policy/policy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "cpu/empty.h"

namespace fastroute::policy {
namespace {

using BFloat16 = torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;

constexpr int64_t kTileNumbers = 4096;   // a tile and its draws stay in a first-level cache
constexpr int64_t kThreadNumbers = 16384;  // worth waking a thread for

// Calls f with the address of a number of this type.
template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(static_cast<const float*>(nullptr));
    case ScalarType::Double: return f(static_cast<const double*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<const BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "policy: expected float32, float64 or bfloat16");
  }
}

// scores [N, K], and what is made of them
void check_scores(const Check& check, const Tensor& scores, int64_t kind) {
  check.tensor("scores", scores, kFloats, {kAny, kAny}, Layout::kStrided);
  check.that(scores.size(1) >= 1, "scores: expected at least one choice");
  check.that(kind >= kSoftmax && kind <= kShifted, "kind: expected 0 to ", int64_t{kShifted}, ", got ", kind);
}

// A tensor [N, K] or [N] of any of the dtypes and any strides, read in tiles.
class Source {
 public:
  explicit Source(const Tensor& t)
      : data_(t.data_ptr()), type_(t.scalar_type()), row_(t.stride(0)), K_(t.dim() > 1 ? t.size(1) : 1),
        column_(t.dim() > 1 ? t.stride(1) : 1) {}

  template <class T>
  void read(T* to, int64_t start, int64_t rows) const {
    with_type(type_, [&](auto* type) {
      const auto* from = static_cast<decltype(type)>(data_) + start * row_;
      if (column_ == 1 && row_ == K_) {
        std::transform(from, from + rows * K_, to, [](auto v) { return static_cast<T>(v); });
        return;
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < K_; ++k) {
          *to++ = static_cast<T>(from[i * row_ + k * column_]);
        }
      }
    });
  }

 private:
  const void* data_;
  ScalarType type_;
  int64_t row_, K_, column_;
};

// f(first row, rows, scratch) over tiles of rows; the scratch holds `arrays` tiles.
template <class T, class F>
void for_tiles(int64_t N, int64_t K, int64_t arrays, const F& f) {
  const int64_t tile = std::clamp<int64_t>(kTileNumbers / K, 1, std::max<int64_t>(N, 1));
  const int64_t tiles = (N + tile - 1) / tile;
  const auto run = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[arrays * tile * K]);
    for (int64_t t = begin; t < end; ++t) {
      f(t * tile, std::min(tile, N - t * tile), scratch.get());
    }
  };
  if (N * K < 2 * kThreadNumbers) {
    run(0, tiles);
  } else {
    torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, kThreadNumbers / (tile * K)), run);
  }
}

template <class T>
struct Draw {
  std::optional<Source> uniform, coin;
  Kind kind;
  T temperature;
  double exploration;

  // actions [rows], from scores z (for a softmax already divided by the temperature); race is overwritten
  void operator()(int64_t* actions, const int64_t* greedy, const T* z, T* race, int64_t start, int64_t rows,
                  int64_t K) const {
    if (!uniform.has_value()) {
      std::copy_n(greedy, rows, actions);
      return;
    }
    uniform->read(race, start, rows);
    if (kind == kSoftmax) {
      policy::rows<T>().race_softmax(race, z, rows * K);
    } else if (kind == kShifted) {
      policy::rows<T>().race_shifted(race, z, rows, K);
    }
    policy::rows<T>().argmax(actions, race, rows, K);
    if (coin.has_value()) {
      T* coins = race;  // K >= 1 of them a row
      coin->read(coins, start, rows);
      for (int64_t i = 0; i < rows; ++i) {
        actions[i] = coins[i] < static_cast<T>(exploration) ? actions[i] : greedy[i];
      }
    }
  }
};

// Copies the forced actions; says whether all are below K.
bool force(int64_t* actions, const Tensor& forced, int64_t start, int64_t rows, int64_t K) {
  const int64_t stride = forced.stride(0);
  const auto* from = static_cast<const int64_t*>(forced.data_ptr()) + start * stride;
  bool in_range = true;
  for (int64_t i = 0; i < rows; ++i) {
    in_range &= from[i * stride] < K;
    actions[i] = std::min(from[i * stride], K - 1);
  }
  return in_range;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward_op(
    const Tensor& scores, const OptionalTensor& uniform, const OptionalTensor& coin, const OptionalTensor& forced,
    int64_t kind, double temperature, double exploration) {
  const Check check("policy");
  check_scores(check, scores, kind);
  const int64_t N = scores.size(0), K = scores.size(1);
  check.tensor("uniform", uniform, kFloats, {N, K}, Layout::kStrided);
  check.tensor("coin", coin, kFloats, {N}, Layout::kStrided);
  check.tensor("forced", forced, ScalarType::Long, {N}, Layout::kStrided);
  const bool is_double = scores.scalar_type() == ScalarType::Double;
  Tensor actions = empty_cpu<1>({N}, ScalarType::Long), greedy = empty_cpu<1>({N}, ScalarType::Long);
  Tensor value = empty_cpu<1>({N}, is_double ? ScalarType::Double : ScalarType::Float);
  auto* action = static_cast<int64_t*>(actions.data_ptr());
  auto* best = static_cast<int64_t*>(greedy.data_ptr());
  std::atomic<bool> in_range = true;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Source source(scores);
    Draw<T> draw{{}, {}, static_cast<Kind>(kind), static_cast<T>(temperature), exploration};
    if (uniform.has_value() && !forced.has_value()) {
      draw.uniform.emplace(*uniform);
      if (coin.has_value()) {
        draw.coin.emplace(*coin);
      }
    }
    auto* values = static_cast<T*>(value.data_ptr());
    for_tiles<T>(N, K, 2, [&](int64_t start, int64_t rows, T* z) {
      T* race = z + rows * K;
      source.read(z, start, rows);
      policy::rows<T>().argmax(best + start, z, rows, K);
      if (kind == kSoftmax) {
        policy::rows<T>().divide(z, static_cast<T>(temperature), rows * K);
      }
      if (!forced.has_value()) {
        draw(action + start, best + start, z, race, start, rows, K);
      } else if (!force(action + start, *forced, start, rows, K)) {
        in_range = false;
      }
      policy::rows<T>().value[kind](values + start, z, action + start, rows, K);
    });
  };
  is_double ? run(double()) : run(float());
  STD_TORCH_CHECK(in_range, "forced: expected indices below ", K);
  return {actions, value, greedy};
}

Tensor gradient(
    const OptionalTensor& grad, const OptionalTensor& also, const Tensor& scores, const Tensor& actions, int64_t kind,
    double temperature) {
  const Check check("policy");
  check_scores(check, scores, kind);
  const int64_t N = scores.size(0), K = scores.size(1);
  const ScalarType type = scores.scalar_type();
  check.tensor("grad", grad, type == ScalarType::Double ? type : ScalarType::Float, {N});
  check.tensor("grad_scores", also, type, {N, K});
  check.tensor("actions", actions, ScalarType::Long, {N});
  check.in_range("actions", actions, std::numeric_limits<int64_t>::min(), K);
  Tensor made = empty_cpu<2>({N, K}, type);
  const auto* action = static_cast<const int64_t*>(actions.data_ptr());
  with_type(type, [&](auto* as) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(as)>>;
    using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
    const Source source(scores);
    const auto* g = grad.has_value() ? static_cast<const T*>(grad->data_ptr()) : nullptr;
    const auto* more = also.has_value() ? static_cast<const S*>(also->data_ptr()) : nullptr;
    auto* out = static_cast<S*>(made.data_ptr());
    const auto make = [&](T* z, int64_t start, int64_t rows) {
      if (g == nullptr) {
        std::fill_n(z, rows * K, T(0));
      } else {
        source.read(z, start, rows);
        policy::rows<T>().gradient[kind](z, g + start, action + start, static_cast<T>(temperature), rows, K);
      }
      if (more != nullptr) {
        const S* from = more + start * K;
        std::transform(z, z + rows * K, from, z, [](T v, S w) { return v + static_cast<T>(w); });
      }
    };
    if constexpr (std::is_same_v<S, T>) {
      for_tiles<T>(N, K, 0, [&](int64_t start, int64_t rows, T*) { make(out + start * K, start, rows); });
    } else {
      for_tiles<T>(N, K, 1, [&](int64_t start, int64_t rows, T* z) {
        make(z, start, rows);
        std::transform(z, z + rows * K, out + start * K, [](T v) { return static_cast<S>(v); });
      });
    }
  });
  return made;
}

namespace {

Tensor backward_op(const Tensor& grad, const Tensor& scores, const Tensor& actions, int64_t kind, double temperature) {
  return gradient(grad, {}, scores, actions, kind, temperature);
}

}  // namespace
}  // namespace fastroute::policy

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_policy_native", TORCH_BOX(&fastroute::policy::forward_op));
  library.impl("_policy_native_backward", TORCH_BOX(&fastroute::policy::backward_op));
}

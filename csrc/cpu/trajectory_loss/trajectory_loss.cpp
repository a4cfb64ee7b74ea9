// trajectory_loss on a CPU, in one pass over tiles of samples. The contract is fastroute/ops/trajectory_loss/reference.py.
//
// Axes: B samples, T decisions, C differentiable columns. A sample is computed by itself: any number of threads, the
// same bits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/lists.h"
#include "cpu/empty.h"

namespace fastroute::trajectory_loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 256;              // samples; what is kept of a tile stays in a first-level cache
constexpr int64_t kThreadEntries = 32768;  // decisions of samples that are worth waking a thread for

// Indices into fastroute.ops.trajectory_loss.contract.ALGORITHMS, each k and its name.
enum Kind : int64_t {
  kREINFORCE, kREINFORCEBl1, kREINFORCEBl2, kEGreedyREINFORCE, kQLearning, kSARSA, kActorCritic, kAAC, kBootstrapAAC,
  kEGreedyAAC, kAdvantageLearning, kBootstrapAdvantageLearning, kSurpriseLearning, kWPL, kGumbelSoftmax,
};

// Those with a second column, and those that read an auxiliary number.
bool has_critic(int64_t kind) {
  return kind != kREINFORCE && kind != kEGreedyREINFORCE && kind != kQLearning && kind != kSARSA &&
         kind != kGumbelSoftmax;
}
bool is_aided(int64_t kind) {
  return kind == kREINFORCEBl1 || kind == kREINFORCEBl2 || kind == kEGreedyREINFORCE || kind == kEGreedyAAC ||
         kind == kWPL;
}

// Numbers [B] of any dtype and stride; without any, zeros.
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(const Tensor& t) : data_(t.data_ptr()), type_(t.scalar_type()), stride_(t.stride(0)) {}
  bool given() const { return data_ != nullptr; }

  // count of them from start on: where they are, if they are such, else in the buffer
  template <class T>
  const T* read(T* buffer, int64_t start, int64_t count) const {
    if (data_ == nullptr) {
      std::fill_n(buffer, count, T(0));
      return buffer;
    }
    switch (type_) {
      case ScalarType::Float: return as<float>(buffer, start, count);
      case ScalarType::Double: return as<double>(buffer, start, count);
      case ScalarType::BFloat16: return as<torch::headeronly::BFloat16>(buffer, start, count);
      case ScalarType::Half: return as<torch::headeronly::Half>(buffer, start, count);
      default: STD_TORCH_CHECK(false, "trajectory_loss: expected float32, float64, bfloat16 or float16");
    }
  }

 private:
  template <class S, class T>
  const T* as(T* buffer, int64_t start, int64_t count) const {
    const S* from = static_cast<const S*>(data_) + start * stride_;
    if constexpr (std::is_same_v<S, T>) {
      if (stride_ == 1) {
        return from;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      buffer[i] = static_cast<T>(from[i * stride_]);
    }
    return buffer;
  }

  const void* data_ = nullptr;
  ScalarType type_ = ScalarType::Float;
  int64_t stride_ = 1;
};

// Whether a decision was made for a sample, 0 or 1; without a mask, for all. Numbers, for then loops are of one type.
class Mask {
 public:
  Mask() = default;
  explicit Mask(const Tensor& t) : data_(static_cast<const bool*>(t.data_ptr())), stride_(t.stride(0)) {}

  bool given() const { return data_ != nullptr; }

  template <class T>
  void read(T* to, int64_t start, int64_t count) const {
    if (data_ == nullptr) {
      std::fill_n(to, count, T(1));
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      to[i] = data_[(start + i) * stride_];
    }
  }

 private:
  const bool* data_ = nullptr;
  int64_t stride_ = 1;
};

struct Decision {
  Kind kind;
  int64_t choices, c0, c1;  // c0, c1: which columns, -1 if none
  Numbers s0, s1, aux, own, look;
  Mask active;
};

std::vector<Decision> decisions(
    const Tensors& columns, const Tensors& others, const Tensors& masks, const std::vector<int64_t>& layout) {
  const auto numbers = [](const Tensors& of, int64_t i) { return i < 0 ? Numbers() : Numbers(of[i]); };
  std::vector<Decision> made;
  for (size_t k = 0; k + 8 <= layout.size(); k += 8) {
    const int64_t* at = layout.data() + k;
    made.push_back({static_cast<Kind>(at[0]), at[1], at[2], at[3], numbers(columns, at[2]), numbers(columns, at[3]),
                    numbers(others, at[4]), numbers(others, at[5]), numbers(others, at[6]),
                    at[7] < 0 ? Mask() : Mask(masks[at[7]])});
  }
  return made;
}

constexpr Types kNumbers{ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};

// All [B], and a layout whose places are in their lists. Each column is the first or the second of one decision, which
// needs it; so what is written about columns is written, and once.
void check_layout(const Check& check, const Tensor& f, const Tensors& columns, const Tensors& others,
                  const Tensors& masks, const std::vector<int64_t>& layout) {
  check.tensor("f", f, kNumbers, {kAny}, Layout::kStrided);
  const int64_t B = f.size(0);
  for (const Tensors* list : {&columns, &others}) {
    for (const Tensor& t : *list) {
      check.tensor("columns, others", t, kNumbers, {B}, Layout::kStrided);
    }
  }
  for (const Tensor& t : masks) {
    check.tensor("masks", t, ScalarType::Bool, {B}, Layout::kStrided);
  }
  check.that(layout.size() % 8 == 0, "layout: expected 8 numbers for each decision");
  std::vector<bool> used(columns.size());
  for (size_t k = 0; k < layout.size(); k += 8) {
    const int64_t* at = layout.data() + k;
    check.that(at[0] >= kREINFORCE && at[0] <= kGumbelSoftmax, "layout: there is no kind ", at[0]);
    const auto within = [&](int64_t place, size_t count) { return place >= -1 && place < static_cast<int64_t>(count); };
    check.that(within(at[2], columns.size()) && within(at[3], columns.size()) && within(at[4], others.size()) &&
                   within(at[5], others.size()) && within(at[6], others.size()) && within(at[7], masks.size()),
               "layout: expected places in the lists, or -1");
    check.that((at[2] >= 0) == (at[0] != kGumbelSoftmax) && (at[3] >= 0) == has_critic(at[0]) &&
                   (at[4] >= 0 || !is_aided(at[0])),
               "layout: expected the columns that kind ", at[0], " has, and what it needs");
    for (const int64_t c : {at[2], at[3]}) {
      check.that(c < 0 || !used[c], "layout: expected column ", c, " in one place");
      if (c >= 0) {
        used[c] = true;
      }
    }
  }
  check.that(std::find(used.begin(), used.end(), false) == used.end(), "layout: expected all columns in it");
}

// The loss of one decision for one sample, and its derivatives by both columns.
template <class T>
struct Made {
  T loss, d0, d1;
};

template <class T>
T square(T v) { return v * v; }

template <class T>
Made<T> actor_critic(T log_p, T advantage, T critic) {  // critic: what the second column is off by
  return {-log_p * advantage + square(critic), -advantage, 2 * critic};
}

template <class T>
Made<T> advantage_learning(T a, T v, T y) {
  return {square(v - y) + square(a - (y - v)), 2 * (a - (y - v)), 2 * (v - y)};
}

template <class T>
Made<T> weighted_policy(T log_p, T q, T mean, T R) {
  const T p = std::exp(log_p), d = R - mean, step = d < 0 ? d * p : d * (1 - p);
  return {square(p - (p + step)) + square(q - R), -2 * step * p, 2 * (q - R)};
}

// What is kept of a tile of samples on the way from the last decision to the first.
template <class T>
struct Tile {
  T f[kTile], scale[kTile], R[kTile], ahead[kTile], y[kTile], here[kTile];
  T buffer[5][kTile], unwanted[2][kTile];
  T more[kTile], active[kTile];  // 0 or 1: whether the sample has a later decision, and this one
  T zeros[kTile] = {};
};

// to = where ? yes : no; any of them may be the same
template <class T>
void keep(T* to, const T* where, const T* yes, const T* no, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T a = yes[i], b = no[i];
    to[i] = where[i] != 0 ? a : b;
  }
}

template <class T>
class Pass {
 public:
  Pass(const Tensor& f, std::vector<Decision> all, double gamma, bool normalize, T* loss, T* slopes, int64_t B)
      : f_(f), all_(std::move(all)), gamma_(static_cast<T>(gamma)), normalize_(normalize), loss_(loss),
        slopes_(slopes), B_(B) {}

  void operator()(Tile<T>& w, int64_t start, int64_t count) const {
    begin(w, start, count);
    T* total = loss_ + start;
    std::fill_n(total, count, T(0));
    for (size_t t = all_.size(); t-- > 0;) {
      const Decision& d = all_[t];
      d.active.read(w.active, start, count);
      reward(w, d, start, count);
      learn(w, d, total, start, count);
      if (t == 0) {
        return;
      }
      const T* look = d.look.read(w.buffer[4], start, count);
      keep(w.R, w.active, w.here, w.R, count);
      keep(w.ahead, w.active, look, w.ahead, count);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        w.more[i] = w.more[i] > w.active[i] ? w.more[i] : w.active[i];
      }
    }
  }

 private:
  void begin(Tile<T>& w, int64_t start, int64_t count) const {
    const T* f = f_.read(w.f, start, count);
    if (f != w.f) {
      std::copy_n(f, count, w.f);
    }
    std::fill_n(w.R, count, T(0));
    std::fill_n(w.ahead, count, T(0));
    std::fill_n(w.more, count, T(0));
    T* made = w.scale;
    std::fill_n(made, count, T(0));
    T by_all = 0;
    for (const Decision& d : all_) {
      if (!d.active.given()) {
        by_all += 1;
        continue;
      }
      d.active.read(w.active, start, count);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        made[i] += w.active[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T decisions = made[i] + by_all;
      w.scale[i] = (normalize_ ? std::abs(w.f[i]) : T(1)) / (decisions < 1 ? T(1) : decisions);
    }
  }

  // R and y of the decision
  void reward(Tile<T>& w, const Decision& d, int64_t start, int64_t count) const {
    T* r = w.buffer[0];
    keep(r, w.more, w.zeros, w.f, count);
    if (d.own.given()) {
      const T* own = d.own.read(w.buffer[1], start, count);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        r[i] += own[i] * w.scale[i];
      }
    }
    const bool surprise = d.kind == kSurpriseLearning;
    const T sign = surprise ? T(-1) : T(1);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      w.here[i] = r[i] + gamma_ * w.R[i];
      w.y[i] = gamma_ * w.ahead[i] + sign * r[i];
    }
    keep(w.y, w.more, w.y, surprise ? w.f : r, count);
  }

  void learn(Tile<T>& w, const Decision& d, T* total, int64_t start, int64_t count) const {
    const T K = static_cast<T>(d.choices);
    // of a sample: the columns, the auxiliary number, R, y
    switch (d.kind) {
      case kREINFORCE:
        return each(w, d, total, start, count, [](T s, T, T, T R, T) { return Made<T>{-s * R, -R, 0}; });
      case kREINFORCEBl1:
        return each(w, d, total, start, count, [](T s, T v, T aux, T R, T y) { return actor_critic(s, R - aux, v - y); });
      case kREINFORCEBl2:
        return each(w, d, total, start, count, [K](T s, T v, T aux, T R, T y) {
          return actor_critic(s, R / (K * std::exp(s)) - aux, v - y);
        });
      case kEGreedyREINFORCE:
        return each(w, d, total, start, count, [](T s, T, T aux, T R, T) {
          return Made<T>{-s * (aux * R), -(aux * R), 0};
        });
      case kQLearning:
      case kSARSA:
        return each(w, d, total, start, count, [](T q, T, T, T, T y) { return Made<T>{square(q - y), 2 * (q - y), 0}; });
      case kActorCritic:
        return each(w, d, total, start, count, [](T s, T q, T, T R, T y) { return actor_critic(s, R - q, q - y); });
      case kAAC:
        return each(w, d, total, start, count, [](T s, T v, T, T R, T) { return actor_critic(s, R - v, v - R); });
      case kBootstrapAAC:
        return each(w, d, total, start, count, [](T s, T v, T, T, T y) { return actor_critic(s, y - v, v - y); });
      case kEGreedyAAC:
        return each(w, d, total, start, count, [](T s, T v, T aux, T R, T) {
          return actor_critic(s, aux * (R - v), v - R);
        });
      case kAdvantageLearning:
        return each(w, d, total, start, count, [](T a, T v, T, T R, T) { return advantage_learning(a, v, R); });
      case kBootstrapAdvantageLearning:
      case kSurpriseLearning:
        return each(w, d, total, start, count, [](T a, T v, T, T, T y) { return advantage_learning(a, v, y); });
      case kWPL:
        return each(w, d, total, start, count, [](T s, T q, T aux, T R, T) { return weighted_policy(s, q, aux, R); });
      case kGumbelSoftmax:
        return;
      default:
        STD_TORCH_CHECK(false, "trajectory_loss: unknown kind ", static_cast<int64_t>(d.kind));
    }
  }

  template <class F>
  void each(Tile<T>& w, const Decision& d, T* total, int64_t start, int64_t count, const F& of) const {
    const T* s0 = d.s0.read(w.buffer[0], start, count);
    const T* s1 = d.s1.read(w.buffer[1], start, count);
    const T* aux = d.aux.read(w.buffer[2], start, count);
    T* d0 = slopes_ == nullptr || d.c0 < 0 ? w.unwanted[0] : slopes_ + d.c0 * B_ + start;
    T* d1 = slopes_ == nullptr || d.c1 < 0 ? w.unwanted[1] : slopes_ + d.c1 * B_ + start;
    T* loss = w.buffer[3];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Made<T> made = of(s0[i], s1[i], aux[i], w.here[i], w.y[i]);
      loss[i] = made.loss;
      d0[i] = made.d0;
      d1[i] = made.d1;
    }
    if (d.active.given()) {
      for (T* made : {loss, d0, d1}) {
        keep(made, w.active, made, w.zeros, count);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      total[i] += loss[i];
    }
  }

  Numbers f_;
  std::vector<Decision> all_;
  T gamma_;
  bool normalize_;
  T *loss_, *slopes_;
  int64_t B_;
};

bool is_double(const Tensors& tensors) {
  return std::any_of(
      tensors.begin(), tensors.end(), [](const Tensor& t) { return t.scalar_type() == ScalarType::Double; });
}

// f(first, how many) over tiles of B samples
template <class F>
void for_tiles(int64_t B, int64_t entries, const F& f) {
  const int64_t tiles = (B + kTile - 1) / kTile;
  if (entries < 2 * kThreadEntries) {
    f(0, tiles);
  } else {
    torch::stable::parallel_for(0, tiles, std::max<int64_t>(1, kThreadEntries * tiles / entries), f);
  }
}

std::tuple<Tensor, Tensor> forward_op(
    const Tensor& f, const Tensors& columns, const Tensors& others, const Tensors& masks,
    const std::vector<int64_t>& layout, double gamma, bool normalize, bool want_slopes) {
  check_layout(Check("trajectory_loss"), f, columns, others, masks, layout);
  const int64_t B = f.size(0), C = want_slopes ? static_cast<int64_t>(columns.size()) : 0;
  const bool in_double = f.scalar_type() == ScalarType::Double || is_double(columns) || is_double(others);
  const ScalarType type = in_double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = empty_cpu<1>({B}, type), slopes = empty_cpu<2>({C, B}, type);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Pass<T> pass(f, decisions(columns, others, masks, layout), gamma, normalize,
                       static_cast<T*>(loss.data_ptr()), C ? static_cast<T*>(slopes.data_ptr()) : nullptr, B);
    const int64_t entries = B * static_cast<int64_t>(layout.size() / 8);
    for_tiles(B, entries, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<Tile<T>> tile(new Tile<T>);
      for (int64_t i = begin; i < end; ++i) {
        pass(*tile, i * kTile, std::min(kTile, B - i * kTile));
      }
    });
  };
  in_double ? run(double()) : run(float());
  return {loss, slopes};
}

Tensors backward_op(const Tensor& grad, const Tensor& slopes) {
  const Check check("trajectory_loss");
  check.tensor("slopes", slopes, {ScalarType::Float, ScalarType::Double}, {kAny, kAny}, Layout::kDense);
  check.tensor("grad", grad, slopes.scalar_type(), {slopes.size(1)}, Layout::kStrided);
  const int64_t C = slopes.size(0), B = slopes.size(1), stride = grad.stride(0);
  const ScalarType type = slopes.scalar_type();
  Tensors made;
  made.reserve(C);
  for (int64_t c = 0; c < C; ++c) {
    made.push_back(empty_cpu<1>({B}, type));
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto* g = static_cast<const T*>(grad.data_ptr());
    const auto* from = static_cast<const T*>(slopes.data_ptr());
    for_tiles(B, B * C, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * kTile, B);
      for (int64_t c = 0; c < C; ++c) {
        auto* to = static_cast<T*>(made[c].data_ptr());
        for (int64_t i = begin * kTile; i < last; ++i) {
          to[i] = g[i * stride] * from[c * B + i];
        }
      }
    });
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return made;
}

}  // namespace
}  // namespace fastroute::trajectory_loss

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  using namespace fastroute;
  library.impl("_trajectory_loss_native", TORCH_BOX(&WithLists<trajectory_loss::forward_op>::call));
  library.impl("_trajectory_loss_native_backward", TORCH_BOX(&trajectory_loss::backward_op));
}

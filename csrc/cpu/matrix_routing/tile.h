// A pass's tiles of inputs: what is read, how it is divided, and the votes and assignments of a tile.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "common/check.h"
#include "cpu/empty.h"
#include "cpu/matrix_routing/matrix_routing.h"

namespace fastroute::matrix_routing {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kVector = 16;  // outputs are padded to as many: 64 bytes of float

// While it lives, this thread's numbers too small for full precision are zero. Softmaxes make them in plenty, where an
// input is nothing to an output; nothing depends on them, and arithmetic on them is a hundred times slower.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Memory on a vector's boundary.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : data_(new (kAlign) T[count]) {}
  Buffer(int64_t count, T value) : Buffer(count) { std::fill_n(data_.get(), count, value); }
  operator T*() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete[](data, kAlign); }
  };
  std::unique_ptr<T[], Delete> data_;
};

template <class T>
T* pointer(const OptionalTensor& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// [B, m, k] as [B, k, p], and with `past` after m.
template <class T>
Buffer<T> turned(const OptionalTensor& t, const Sizes& s, int64_t k, T past = T(0)) {
  if (!t.has_value()) {
    return Buffer<T>();
  }
  Buffer<T> to(s.B * k * s.p);
  const T* from = static_cast<const T*>(t->data_ptr());
  for (int64_t b = 0; b < s.B; ++b) {
    rows<T>().turn(to + b * k * s.p, from + b * k * s.m, s.m, k, s.p);
    for (int64_t x = 0; x < k; ++x) {
      std::fill(to + (b * k + x) * s.p + s.m, to + (b * k + x + 1) * s.p, past);
    }
  }
  return to;
}

// [B, k, p] in double as a tensor [B, m, k], or [B, m] where shape is empty
template <class T>
Tensor as_tensor(const double* from, const Sizes& s, bool matrices) {
  constexpr ScalarType type = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
  Tensor made = matrices ? empty_cpu<4>({s.B, s.m, s.c, s.h}, type) : empty_cpu<2>({s.B, s.m}, type);
  T* to = static_cast<T*>(made.data_ptr());
  const int64_t k = matrices ? s.c * s.h : 1;
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t j = 0; j < s.m; ++j) {
      for (int64_t x = 0; x < k; ++x) {
        *to++ = static_cast<T>(from[(b * k + x) * s.p + j]);
      }
    }
  }
  return made;
}

struct Inputs {
  const Tensor &gate, &mu_inp, &W, &bias, &use, &ign;
  const OptionalTensor &mask, &prior, &mu, &weight;
};

inline ScalarType sum_type(const Inputs& in) {
  return in.mu_inp.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// All that a pass reads fits mu_inp [B, n, c, d] and W [n or 1, m, d, h].
inline void check_inputs(const Check& check, const Inputs& in) {
  const ScalarType sums = sum_type(in);
  check.tensor("mu_inp", in.mu_inp, sums, {kAny, kAny, kAny, kAny});
  const int64_t B = in.mu_inp.size(0), n = in.mu_inp.size(1), c = in.mu_inp.size(2), d = in.mu_inp.size(3);
  const ScalarType type = sums == ScalarType::Float && in.W.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16
                                                                                                : sums;
  check.tensor("W", in.W, type, {kAny, kAny, d, kAny});
  const int64_t sets = in.W.size(0), m = in.W.size(1), h = in.W.size(3);
  check.that(sets == n || sets == 1, "W: expected parameters of ", n, " inputs, or of 1, got ", sets);
  check.that(std::min({B, n, m, c, d, h}) >= 1, "mu_inp, W: expected none empty");
  check.tensor("bias", in.bias, type, {sets, m, c, h});
  check.tensor("beta_use", in.use, type, {sets, m});
  check.tensor("beta_ign", in.ign, type, {sets, m});
  check.tensor("gate", in.gate, sums, {B, n});
  check.tensor("mask", in.mask, ScalarType::Bool, {B, n, m}, Layout::kStrided);
  check.tensor("prior", in.prior, sums, {B, m});
  check.tensor("mu", in.mu, sums, {B, m, c, h});
  check.tensor("weight", in.weight, sums, {B, m, c, h});
  check.that(in.prior.has_value() == in.mu.has_value() && in.mu.has_value() == in.weight.has_value(),
             "prior: expected with mu and weight, or none of them");
}

// T is the dtype of sums, P that of parameters.
template <class T, class P>
struct Problem {
  Sizes s;
  bool shared;
  const T *gate, *mu_inp;
  const P *W, *bias, *use, *ign;
  const uint8_t* mask;
  int64_t mask_batch, mask_row, mask_col;
  Buffer<T> prior, mu, weight;  // [B, p], [B, c, h, p]
  bool first;

  explicit Problem(const Inputs& in)
      : s{in.mu_inp.size(0), in.mu_inp.size(1), in.W.size(1), in.mu_inp.size(2), in.mu_inp.size(3), in.W.size(3),
          (in.W.size(1) + kVector - 1) / kVector * kVector},
        shared(in.W.size(0) == 1), gate(static_cast<const T*>(in.gate.data_ptr())),
        mu_inp(static_cast<const T*>(in.mu_inp.data_ptr())), W(static_cast<const P*>(in.W.data_ptr())),
        bias(static_cast<const P*>(in.bias.data_ptr())), use(static_cast<const P*>(in.use.data_ptr())),
        ign(static_cast<const P*>(in.ign.data_ptr())), mask(pointer<uint8_t>(in.mask)),
        mask_batch(mask != nullptr ? in.mask->stride(0) : 0), mask_row(mask != nullptr ? in.mask->stride(1) : 0),
        mask_col(mask != nullptr ? in.mask->stride(2) : 0),
        prior(turned<T>(in.prior, s, 1, -std::numeric_limits<T>::infinity())), mu(turned<T>(in.mu, s, s.c * s.h)),
        weight(turned<T>(in.weight, s, s.c * s.h)), first(!in.prior.has_value()) {}

  Previous<T> previous(int64_t b) const {
    if (first) {
      return {nullptr, nullptr, nullptr};
    }
    return {prior + b * s.p, mu + b * s.votes(), weight + b * s.votes()};
  }
};

// How the work is divided, by shape only: row_pieces times sample_pieces, each over tiles of inputs.
struct Division {
  int64_t row_pieces, inputs, sample_pieces, samples, tile;

  Division(const Sizes& s, bool shared, bool gradients, size_t itemsize) {
    row_pieces = std::clamp<int64_t>(s.n / 64, 1, 8);
    if (shared) {  // samples first: their sums are their own
      sample_pieces = std::min<int64_t>(s.B, 8);
      row_pieces = std::min(row_pieces, std::max<int64_t>(1, 8 / sample_pieces));
    } else {  // parameters are turned again for each piece of samples, and their gradients summed over all
      sample_pieces = gradients ? 1 : std::clamp<int64_t>(s.B / 8, 1, 8 / row_pieces);
    }
    samples = (s.B + sample_pieces - 1) / sample_pieces;
    sample_pieces = (s.B + samples - 1) / samples;
    inputs = (s.n + row_pieces - 1) / row_pieces;
    row_pieces = (s.n + inputs - 1) / inputs;
    const bool heavy = shared && s.weights() > 4 * s.votes();
    const int64_t cache = (heavy ? int64_t{1} << 19 : int64_t{1} << 16) / static_cast<int64_t>(itemsize);
    tile = std::min(inputs, std::clamp<int64_t>(cache / s.votes(), 4, 64));
  }
  int64_t pieces() const { return row_pieces * sample_pieces; }
  // f(row piece, its inputs' begin and end, its samples' begin and end)
  template <class F>
  void parallel(const Sizes& s, const F& f) const {
    torch::stable::parallel_for(0, pieces(), 1, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const FlushSubnormals flush;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t r = k / sample_pieces, q = k % sample_pieces;
        f(k, r, r * inputs, std::min(s.n, (r + 1) * inputs), q * samples, std::min(s.B, (q + 1) * samples));
      }
    });
  }
};

template <class T, class S>
const T* widened(const S* from, int64_t count, T* to) {
  if constexpr (std::is_same_v<T, S>) {
    return from;
  } else {
    for (int64_t k = 0; k < count; ++k) {
      to[k] = static_cast<T>(from[k]);
    }
    return to;
  }
}

// A tile's parameters with outputs last, and its live inputs' votes and assignments for one sample.
template <class T, class P>
class Tile {
 public:
  const Problem<T, P>& q;
  const Sizes& s;
  int64_t start = 0, count = 0, live = 0;
  Buffer<int64_t> index;                       // of live inputs, in the tile
  Buffer<T> W, bias, use, ign, V, R, D, open;  // of inputs, but V, R, D, open of live inputs

  Tile(const Problem<T, P>& q, int64_t inputs)
      : q(q), s(q.s), index(inputs), W((q.shared ? 1 : inputs) * s.weights()), bias((q.shared ? 1 : inputs) * s.votes()),
        use((q.shared ? 1 : inputs) * s.p), ign((q.shared ? 1 : inputs) * s.p), V(inputs * s.votes()), R(inputs * s.p),
        D(inputs * s.p), open(q.mask != nullptr ? inputs * s.p : 0), mu_(inputs * s.c * s.d),
        wide_(std::is_same_v<T, P> ? 0 : s.m * std::max(s.c, s.d) * s.h) {
    if (q.shared) {
      load(0, 0);
    }
  }

  void begin(int64_t at, int64_t inputs) {
    start = at;
    count = inputs;
    for (int64_t i = 0; i < count && !q.shared; ++i) {
      load(start + i, i);
    }
  }

  // which of the tile's inputs is the live one's set of parameters
  int64_t parameters(int64_t k) const { return q.shared ? 0 : index[k]; }
  T gate(int64_t b, int64_t k) const { return q.gate[b * s.n + start + index[k]]; }
  const T* mu_inp(int64_t b, int64_t k) const { return q.mu_inp + (b * s.n + start + index[k]) * s.c * s.d; }
  const T* opened(int64_t k) const { return q.mask != nullptr ? open + k * s.p : nullptr; }
  // all live inputs' matrices, one after another
  const T* all_mu_inp(int64_t b) const {
    if (live == count) {
      return mu_inp(b, 0);
    }
    for (int64_t k = 0; k < live; ++k) {
      std::copy_n(mu_inp(b, k), s.c * s.d, mu_ + k * s.c * s.d);
    }
    return mu_;
  }

  // votes and assignments of sample b; false if no input is live
  bool assign(int64_t b) {
    const auto& f = rows<T>();
    live = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (q.gate[b * s.n + start + i] == 0) {
        continue;
      }
      int64_t ways = s.m;
      if (q.mask != nullptr) {
        const uint8_t* closed = q.mask + b * q.mask_batch + (start + i) * q.mask_row;
        T* to = open + live * s.p;
        ways = 0;
        for (int64_t j = 0; j < s.m; ++j) {
          const bool is_open = closed[j * q.mask_col] == 0;
          to[j] = is_open ? T(1) : T(0);
          ways += is_open;
        }
        std::fill(to + s.m, to + s.p, T(0));
        if (ways == 0) {
          continue;
        }
      }
      index[live++] = i;
      if (q.first) {
        f.assign_even(s, R + (live - 1) * s.p, D + (live - 1) * s.p, T(1) / static_cast<T>(ways), opened(live - 1),
                      gate(b, live - 1));
      }
    }
    if (live == 0) {
      return false;
    }
    if (q.shared) {
      f.votes(s, V, all_mu_inp(b), W, bias, live * s.c);
    }
    for (int64_t k = 0; k < live; ++k) {
      if (!q.shared) {
        f.votes(s, V + k * s.votes(), mu_inp(b, k), W + index[k] * s.weights(), bias + index[k] * s.votes(), s.c);
      }
      if (!q.first) {
        f.assign(s, R + k * s.p, D + k * s.p, V + k * s.votes(), q.previous(b), opened(k), gate(b, k));
      }
    }
    return true;
  }

 private:
  void load(int64_t i, int64_t to) {
    const auto& f = rows<T>();
    const int64_t dh = s.d * s.h, ch = s.c * s.h;
    f.turn(W + to * s.weights(), widened<T>(q.W + i * s.m * dh, s.m * dh, wide_), s.m, dh, s.p);
    f.turn(bias + to * s.votes(), widened<T>(q.bias + i * s.m * ch, s.m * ch, wide_), s.m, ch, s.p);
    f.turn(use + to * s.p, widened<T>(q.use + i * s.m, s.m, wide_), s.m, 1, s.p);
    f.turn(ign + to * s.p, widened<T>(q.ign + i * s.m, s.m, wide_), s.m, 1, s.p);
  }

  Buffer<T> mu_, wide_;
};

}  // namespace fastroute::matrix_routing

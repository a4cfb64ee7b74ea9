// soft_assignment on a CPU, in tiles of rows. The contract is fastroute/ops/soft_assignment/reference.py.
//
// Axes: B samples, n inputs (rows), m outputs, h width of a vote. Votes come as [B or 1, n, m or 1, h]: the same for all
// samples, for all outputs, or both. Votes that are the same for all outputs are multiplied as matrices: by few outputs
// with the kernels of grouped_linear, since a library's products are made for wide ones.

#include "cpu/soft_assignment/soft_assignment.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/gemm.h"
#include "cpu/empty.h"
#include "cpu/grouped_linear/grouped_linear.h"

namespace fastroute::soft_assignment {
namespace {

using BFloat16 = torch::headeronly::BFloat16;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

constexpr int64_t kTileBytes = 256 << 10;  // of votes and rows together: stays in a second-level cache
constexpr int64_t kThin = 64;              // outputs up to which products are grouped_linear's, not a library's
constexpr int64_t kThinRows = 40;          // of a tile for these: few enough for outer to read them where they lie, which
                                           // is up to twice as fast (AVX2)
constexpr int64_t kPieces = 8;             // the most that the rows of all samples are divided into, if samples are few
constexpr int64_t kPieceRows = 256;        // the fewest rows worth a piece

struct Inputs {
  const Tensor& votes;
  const OptionalTensor &scores, &gate, &use, &ign, &prior, &mask, &lengths;
  double eps;
};

template <class T>
T* data(const OptionalTensor& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// f(a number of the dtype of sums, a number of the votes' dtype)
template <class F>
void with_types(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float(), float());
    case ScalarType::Double: return f(double(), double());
    case ScalarType::BFloat16: return f(float(), BFloat16());
    default: STD_TORCH_CHECK(false, "soft_assignment: expected float32, float64 or bfloat16");
  }
}

// The sizes of a call whose arguments fit one another.
struct Sizes {
  int64_t B, n, m, h;
  ScalarType sums;

  Sizes(const Check& check, const Inputs& in) {
    check.tensor("votes", in.votes, kFloats, {kAny, kAny, kAny, kAny}, Layout::kRows);
    sums = in.votes.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check.that(in.scores.has_value() || (in.gate.has_value() && in.prior.has_value()),
               "scores: expected some, or a gate and a prior");
    check.tensor("scores", in.scores, sums, {kAny, kAny, kAny});
    check.tensor("gate", in.gate, sums, {kAny, kAny});
    check.tensor("prior", in.prior, sums, {kAny});
    const Tensor& known = in.scores.has_value() ? *in.scores : *in.gate;
    B = known.size(0);
    n = known.size(1);
    m = in.scores.has_value() ? in.scores->size(2) : in.prior->size(0);
    h = in.votes.size(3);
    check.that(std::min({B, n, m, h}) >= 1, "votes: expected none empty");
    check.tensor("votes", in.votes, in.votes.scalar_type(), {shared(in.votes, 0, B), n, shared(in.votes, 2, m), h},
                 Layout::kRows);
    check.tensor("gate", in.gate, sums, {B, n});
    check.tensor("prior", in.prior, sums, {m});
    for (const OptionalTensor* beta : {&in.use, &in.ign}) {
      check.tensor("betas", *beta, sums, {kAny, n, m});
      check.that(!beta->has_value() || shared(**beta, 0, B) == (*beta)->size(0), "betas: expected ", B, " samples, or 1");
    }
    check.tensor("mask", in.mask, ScalarType::Bool, {B, n, m}, Layout::kStrided);
    check.tensor("lengths", in.lengths, ScalarType::Long, {B});
  }

 private:
  // What the size of an axis has to be: 1 where it is, else full.
  static int64_t shared(const Tensor& t, int64_t dim, int64_t full) { return t.size(dim) == 1 ? 1 : full; }
};

// The call as plain numbers. Everything but votes and mask is dense, in T.
template <class T, class X>
struct Problem {
  int64_t B, n, m, h;
  bool same_samples, same_outputs;  // of votes
  const X* votes;
  int64_t vote_sample, vote_row, vote_out;
  const T *scores, *gate, *use, *ign, *prior;
  int64_t use_sample, ign_sample;  // 0 where all samples share them
  const bool* mask;
  int64_t mask_sample, mask_row, mask_out;
  const int64_t* lengths;
  T eps;

  explicit Problem(const Inputs& in) : h(in.votes.size(3)), eps(static_cast<T>(in.eps)) {
    const Tensor& known = in.scores.has_value() ? *in.scores : *in.gate;
    B = known.size(0);
    n = known.size(1);
    m = in.scores.has_value() ? in.scores->size(2) : in.prior->size(0);
    same_samples = in.votes.size(0) != B;
    same_outputs = in.votes.size(2) != m;
    votes = static_cast<const X*>(in.votes.data_ptr());
    vote_sample = same_samples ? 0 : in.votes.stride(0);
    vote_row = in.votes.stride(1);
    vote_out = same_outputs ? 0 : in.votes.stride(2);
    scores = data<T>(in.scores);
    gate = data<T>(in.gate);
    use = data<T>(in.use);
    ign = data<T>(in.ign);
    prior = data<T>(in.prior);
    use_sample = use != nullptr && in.use->size(0) == B ? n * m : 0;
    ign_sample = ign != nullptr && in.ign->size(0) == B ? n * m : 0;
    mask = data<bool>(in.mask);
    if (mask != nullptr) {
      mask_sample = in.mask->stride(0);
      mask_row = in.mask->stride(1);
      mask_out = in.mask->stride(2);
    }
    lengths = data<int64_t>(in.lengths);
  }

  int64_t vote_outputs() const { return same_outputs ? 1 : m; }
  int64_t tile_rows() const {
    const int64_t row = (vote_outputs() * h + 4 * m) * static_cast<int64_t>(sizeof(T));
    return std::clamp<int64_t>(kTileBytes / row, 8, same_outputs && m <= kThin ? kThinRows : 512);
  }
  // How many of the rows from start to stop there are in sample b.
  int64_t live(int64_t b, int64_t start, int64_t stop) const {
    return lengths == nullptr ? stop - start : std::clamp(lengths[b], start, stop) - start;
  }
  const X* votes_at(int64_t b, int64_t start) const { return votes + b * vote_sample + start * vote_row; }
};

// What one thread works on: the pairs of a tile, and its votes in T.
template <class T, class X>
class Workspace {
 public:
  explicit Workspace(const Problem<T, X>& q)
      : q_(q), size_(q.tile_rows() * q.m + kBeyond), pairs_(new T[4 * size_]),
        votes_(std::is_same_v<T, X> ? 0 : q.tile_rows() * q.vote_outputs() * q.h) {}

  T* dphi() const { return pairs_.get() + 3 * size_; }

  Tile<T> weigh(int64_t b, int64_t start, int64_t count) const {
    const int64_t at = start * q_.m, row = b * q_.n + start;
    Tile<T> a{};
    a.scores = q_.scores == nullptr ? nullptr : q_.scores + row * q_.m;
    a.prior = q_.prior;
    a.gate = q_.gate == nullptr ? nullptr : q_.gate + row;
    a.use = q_.use == nullptr ? nullptr : q_.use + b * q_.use_sample + at;
    a.ign = q_.ign == nullptr ? nullptr : q_.ign + b * q_.ign_sample + at;
    if (q_.mask != nullptr) {
      a.mask = q_.mask + b * q_.mask_sample + start * q_.mask_row;
      a.mask_row = q_.mask_row;
      a.mask_out = q_.mask_out;
    }
    a.eps = q_.eps;
    a.rows = count;
    a.m = q_.m;
    a.R = pairs_.get();
    const bool is_open = q_.mask == nullptr, has_betas = q_.use != nullptr || q_.ign != nullptr;
    a.t = is_open && !has_betas ? a.R : a.R + size_;
    a.w = is_open && q_.gate == nullptr && q_.eps == T(0) ? a.t : a.R + 2 * size_;
    soft_assignment::rows<T>().weigh(a);
    return a;
  }

  Votes<const T> votes(int64_t b, int64_t start, int64_t count) {
    const X* from = q_.votes_at(b, start);
    if constexpr (std::is_same_v<T, X>) {
      return {from, q_.vote_row, q_.vote_out};
    } else {
      const int64_t outputs = q_.vote_outputs();
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < outputs; ++j) {
          const X* vote = from + i * q_.vote_row + j * q_.vote_out;
          std::transform(vote, vote + q_.h, votes_.data() + (i * outputs + j) * q_.h,
                         [](X v) { return static_cast<T>(v); });
        }
      }
      return {votes_.data(), outputs * q_.h, q_.same_outputs ? 0 : q_.h};
    }
  }

 private:
  const Problem<T, X>& q_;
  int64_t size_;
  std::unique_ptr<T[]> pairs_;
  std::vector<T> votes_;
};

// The three products of a tile's votes [rows, h] that are the same for all outputs.
template <class T>
class SharedProducts {
 public:
  SharedProducts(int64_t rows, int64_t m, int64_t h, bool is_alone)
      : m_(m), h_(h), is_thin_(m <= kThin), product_(is_alone) {
    if (is_thin_) {
      left_.resize(rows);
      right_.resize(rows);
      out_.resize(rows);
      made_.resize(std::max(m, rows) * h);
      scratch_.resize(grouped_linear::kernels<T>().outer_scratch(rows, m, h));
    }
  }

  // w^T votes [m, h]
  const T* sums(const T* w, Votes<const T> votes, int64_t rows) {
    if (!is_thin_) {
      return product_(Matrix<const T>(w, rows, m_, m_).transposed(), matrix(votes, rows));
    }
    point(left_, w, m_, rows);
    point(right_, votes.data, votes.row, rows);
    grouped_linear::kernels<T>().outer(made_.data(), h_, left_.data(), right_.data(), rows, 0, m_, h_, scratch_.data());
    return made_.data();
  }

  // to = votes g^T + p [rows, m]
  void dots(T* to, Votes<const T> votes, const T* g, const T* p, int64_t rows) {
    if (is_thin_) {
      point(left_, votes.data, votes.row, rows);
      point(out_, to, m_, rows);
      grouped_linear::kernels<T>().dot(out_.data(), left_.data(), rows, g, h_, p, m_, h_);
      return;
    }
    const T* made = product_(matrix(votes, rows), Matrix<const T>(g, m_, h_, h_).transposed());
    for (int64_t i = 0; i < rows; ++i) {
      std::transform(made + i * m_, made + (i + 1) * m_, p, to + i * m_, [](T x, T y) { return x + y; });
    }
  }

  // to = w g [rows, h], or += where it adds
  void spread(T* to, const T* w, const T* g, bool adds, int64_t rows) {
    const T* made = nullptr;
    if (is_thin_) {
      point(left_, w, m_, rows);
      point(out_, adds ? made_.data() : to, h_, rows);
      grouped_linear::kernels<T>().combine(out_.data(), left_.data(), rows, g, h_, nullptr, h_, m_);
      made = made_.data();
    } else {
      made = product_(Matrix<const T>(w, rows, m_, m_), Matrix<const T>(g, m_, h_, h_));
    }
    if (adds) {
      std::transform(made, made + rows * h_, to, to, [](T x, T y) { return x + y; });
    } else if (!is_thin_) {
      std::copy_n(made, rows * h_, to);
    }
  }

 private:
  Matrix<const T> matrix(Votes<const T> votes, int64_t rows) const {
    return Matrix<const T>(votes.data, rows, h_, votes.row);
  }
  template <class S>
  static void point(std::vector<S*>& to, S* data, int64_t stride, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      to[i] = data + i * stride;
    }
  }

  int64_t m_, h_;
  bool is_thin_;
  std::vector<const T*> left_, right_;
  std::vector<T*> out_;
  std::vector<T> made_, scratch_;
  Product<T> product_;
};

// ------------------------------------------------------------------------------------------------------------- forward

template <class T, class X>
void forward(const Problem<T, X>& q, bool mean, T* M, T* p) {
  const int64_t B = q.B, n = q.n, m = q.m, h = q.h, tile = q.tile_rows();
  // samples go together where they share votes, which are then read once; the division follows from shapes alone
  const int64_t groups = q.same_samples ? 1 : B, samples = B / groups;
  const int64_t pieces = std::clamp<int64_t>(std::min(kPieces / groups, n / kPieceRows), 1, kPieces);
  const int64_t piece_rows = (n + pieces - 1) / pieces, size = m * (h + 1);
  const std::unique_ptr<double[]> all(new double[pieces * B * size]);
  torch::stable::parallel_for(0, groups * pieces, 1, [&](int64_t begin, int64_t end) {
    Workspace<T, X> space(q);
    SharedProducts<T> products(q.same_outputs ? tile : 0, m, h, groups * pieces == 1);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / pieces * samples, piece = item % pieces;
      double* sums = all.get() + piece * B * size;
      std::fill(sums + first * size, sums + (first + samples) * size, 0.0);
      const int64_t last = std::min((piece + 1) * piece_rows, n);
      for (int64_t start = piece * piece_rows; start < last; start += tile) {
        const int64_t stop = std::min(start + tile, last);
        Votes<const T> votes{};
        for (int64_t b = first; b < first + samples; ++b) {
          if (!q.same_samples || b == first) {
            votes = space.votes(b, start, q.same_samples ? stop - start : q.live(b, start, stop));
          }
          const int64_t count = q.live(b, start, stop);
          if (count == 0) {
            continue;
          }
          const Tile<T> a = space.weigh(b, start, count);
          double *to = sums + b * size, *to_p = to + m * h;
          if (q.same_outputs) {
            soft_assignment::rows<T>().add(to, products.sums(a.w, votes, count), m * h);
          } else {
            soft_assignment::rows<T>().add_votes(to, a.w, votes, count, m, h);
          }
          soft_assignment::rows<T>().add_weights(to_p, a.w, count, m);
        }
      }
    }
  });
  for (int64_t piece = 1; piece < pieces; ++piece) {
    std::transform(all.get(), all.get() + B * size, all.get() + piece * B * size, all.get(), std::plus<>());
  }
  for (int64_t b = 0; b < B; ++b) {
    const double* sums = all.get() + b * size;
    T *to = M + b * m * h, *weights = p + b * m;
    std::copy_n(sums, m * h, to);
    std::copy_n(sums + m * h, m, weights);
    for (int64_t j = 0; mean && j < m; ++j) {
      weights[j] = weights[j] <= 0 ? T(1) : weights[j];
      std::transform(to + j * h, to + (j + 1) * h, to + j * h, [&](T sum) { return sum / weights[j]; });
    }
  }
}

std::tuple<Tensor, Tensor> forward_op(
    const Tensor& votes, const OptionalTensor& scores, const OptionalTensor& gate, const OptionalTensor& use,
    const OptionalTensor& ign, const OptionalTensor& prior, const OptionalTensor& mask, const OptionalTensor& lengths,
    double eps, bool mean) {
  const Inputs in{votes, scores, gate, use, ign, prior, mask, lengths, eps};
  const Sizes fitting(Check("soft_assignment"), in);
  Tensor M, p;
  with_types(votes.scalar_type(), [&](auto zero, auto vote) {
    using T = decltype(zero);
    const Problem<T, decltype(vote)> q(in);
    M = empty_cpu<3>({q.B, q.m, q.h}, scalar_type_of<T>());
    p = empty_cpu<2>({q.B, q.m}, scalar_type_of<T>());
    forward(q, mean, static_cast<T*>(M.data_ptr()), static_cast<T*>(p.data_ptr()));
  });
  return {M, p};
}

// ------------------------------------------------------------------------------------------------------------ backward

// Where gradients go: dense, the votes' in their dtype and the others' in T; null: not wanted.
template <class T, class X>
struct Targets {
  X* votes;
  T *scores, *gate, *use, *ign;
};

template <class T, class X>
void backward(const Problem<T, X>& q, const T* dM, const T* dp, const Targets<T, X>& to) {
  const int64_t B = q.B, n = q.n, m = q.m, h = q.h, tile = q.tile_rows(), outputs = q.vote_outputs();
  const int64_t tiles = (n + tile - 1) / tile;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    Workspace<T, X> space(q);
    SharedProducts<T> products(q.same_outputs ? tile : 0, m, h, tiles == 1);
    // a tile of the votes' gradient, where it is in another dtype or its product in other memory
    std::vector<T> own(to.votes != nullptr && !std::is_same_v<T, X> ? tile * outputs * h : 0);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t start = k * tile, stop = std::min(start + tile, n), all = stop - start;
      for (const auto& [target, sample] : {std::pair{to.use, q.use_sample}, std::pair{to.ign, q.ign_sample}}) {
        if (target != nullptr && sample == 0) {
          std::fill(target + start * m, target + stop * m, T(0));
        }
      }
      Votes<const T> votes{};
      for (int64_t b = 0; b < B; ++b) {
        const int64_t count = q.live(b, start, stop), row = b * n + start;
        if (!q.same_samples || b == 0) {
          votes = space.votes(b, start, q.same_samples ? all : count);
        }
        // this sample's part of the votes' gradient, [all, outputs, h]
        X* made = to.votes == nullptr ? nullptr : to.votes + (q.same_samples ? start : row) * outputs * h;
        T* part = nullptr;
        if constexpr (std::is_same_v<T, X>) {
          part = made;
        } else {
          part = made == nullptr ? nullptr : own.data();
        }
        const bool adds = q.same_samples && b > 0;
        if (part != nullptr && !adds) {
          const int64_t from = q.same_samples ? 0 : count * outputs * h;
          std::fill(part + from, part + all * outputs * h, T(0));
        }
        // rows that are padding
        if (to.scores != nullptr) {
          std::fill(to.scores + (row + count) * m, to.scores + (row + all) * m, T(0));
        }
        if (to.gate != nullptr) {
          std::fill(to.gate + row + count, to.gate + row + all, T(0));
        }
        for (const auto& [target, sample] : {std::pair{to.use, q.use_sample}, std::pair{to.ign, q.ign_sample}}) {
          if (target != nullptr && sample != 0) {
            std::fill(target + (row + count) * m, target + (row + all) * m, T(0));
          }
        }
        if (count > 0) {
          const Tile<T> a = space.weigh(b, start, count);
          T* dphi = space.dphi();
          const T *g = dM + b * m * h, *gp = dp + b * m;
          if (q.same_outputs) {
            products.dots(dphi, votes, g, gp, count);
            if (part != nullptr) {
              products.spread(part, a.w, g, q.same_samples, count);
            }
          } else {
            soft_assignment::rows<T>().dot_votes(dphi, g, gp, votes, count, m, h);
            if (part != nullptr) {
              soft_assignment::rows<T>().spread({part, m * h, h}, a.w, g, q.same_samples, count, m, h);
            }
          }
          Gradients<T> finished{};
          finished.gate = to.gate == nullptr ? nullptr : to.gate + row;
          finished.scores = to.scores == nullptr ? nullptr : to.scores + row * m;
          finished.use = to.use == nullptr ? nullptr : to.use + b * q.use_sample + start * m;
          finished.ign = to.ign == nullptr ? nullptr : to.ign + b * q.ign_sample + start * m;
          finished.adds_use = q.use_sample == 0;
          finished.adds_ign = q.ign_sample == 0;
          soft_assignment::rows<T>().finish(a, dphi, finished);
        }
        if constexpr (!std::is_same_v<T, X>) {
          if (made != nullptr && (!q.same_samples || b == B - 1)) {
            std::transform(part, part + all * outputs * h, made, [](T v) { return static_cast<X>(v); });
          }
        }
      }
    }
  });
}

void backward_op(
    const Tensor& votes, const OptionalTensor& scores, const OptionalTensor& gate, const OptionalTensor& use,
    const OptionalTensor& ign, const OptionalTensor& prior, const OptionalTensor& mask, const OptionalTensor& lengths,
    double eps, const Tensor& dM, const Tensor& dp, const OptionalTensor& dvotes, const OptionalTensor& dscores,
    const OptionalTensor& dgate, const OptionalTensor& duse, const OptionalTensor& dign) {
  const Inputs in{votes, scores, gate, use, ign, prior, mask, lengths, eps};
  const Check check("soft_assignment");
  const Sizes s(check, in);
  check.tensor("dM", dM, s.sums, {s.B, s.m, s.h});
  check.tensor("dp", dp, s.sums, {s.B, s.m});
  check.tensor("dvotes", dvotes, votes.scalar_type(), {votes.size(0), s.n, votes.size(2), s.h});
  check.tensor("dscores", dscores, s.sums, {s.B, s.n, s.m});
  check.tensor("dgate", dgate, s.sums, {s.B, s.n});
  for (const auto& [grad, of] : {std::pair{&duse, &use}, std::pair{&dign, &ign}}) {
    check.tensor("gradients of betas", *grad, s.sums, {of->has_value() ? (*of)->size(0) : 0, s.n, s.m});
  }
  check.that((!dscores.has_value() || scores.has_value()) && (!dgate.has_value() || gate.has_value()) &&
                 (!duse.has_value() || use.has_value()) && (!dign.has_value() || ign.has_value()),
             "expected gradients of what is given alone");
  check.apart({if_given(dvotes), if_given(dscores), if_given(dgate), if_given(duse), if_given(dign)},
              {&votes, if_given(scores), if_given(gate), if_given(use), if_given(ign), if_given(prior), if_given(mask),
               if_given(lengths), &dM, &dp});
  with_types(votes.scalar_type(), [&](auto zero, auto vote) {
    using T = decltype(zero);
    using X = decltype(vote);
    const Problem<T, X> q(in);
    const Targets<T, X> to{data<X>(dvotes), data<T>(dscores), data<T>(dgate), data<T>(duse), data<T>(dign)};
    backward(q, static_cast<const T*>(dM.data_ptr()), static_cast<const T*>(dp.data_ptr()), to);
  });
}

}  // namespace
}  // namespace fastroute::soft_assignment

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_soft_assignment_native", TORCH_BOX(&fastroute::soft_assignment::forward_op));
  library.impl("_soft_assignment_native_backward", TORCH_BOX(&fastroute::soft_assignment::backward_op));
}

// All iterations of efficient_routing in one call a pass: inputs of one length, unmasked, with betas of their own, all in one
// dtype. The contract is fastroute/ops/efficient_routing/native.py; the derivation, docs/vector_routing.md.
//
// Work is divided by shape alone wherever a sum depends on how, and each number is otherwise made by one chain of
// operations: the same input gives the same bits on any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/empty.h"
#include "cpu/efficient_routing/efficient_routing.h"

namespace fastroute::efficient_routing {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGroup = 16;                // rows of a sum in T; groups are added up in double
constexpr int64_t kWork = int64_t{1} << 19;   // multiply-adds worth a thread's while
constexpr int64_t kWorthPacking = 16;         // rows that a packed operand is used for

struct Sizes {
  int64_t B, n, m, d, h, iterations;

  int64_t outputs() const { return B * m; }
  int64_t kept() const { return B * n + iterations * outputs() * (d + 1 + h); }
};

// What both passes are given.
template <class T>
struct Call {
  Sizes s;
  bool normalize;
  T scale;
  const T* x;
  int64_t x_batch, x_row;
  const T *W_A, *B_A, *W_F1, *W_F2, *B_F2, *W_G1, *W_G2, *B_G2, *W_S, *B_S, *use, *ign, *prior;
};

// What the forward pass keeps, in one block.
template <class T>
struct Kept {
  T *gate, *M, *p, *y;  // [B, n], [T, B, m, d], [T, B, m], [T, B, m, h]

  Kept(T* block, const Sizes& s)
      : gate(block), M(gate + s.B * s.n), p(M + s.iterations * s.outputs() * s.d), y(p + s.iterations * s.outputs()) {}
};

// One allocation, given out in parts on vectors' boundaries.
class Workspace {
 public:
  template <class T>
  void want(T*& to, int64_t count) {
    static_assert(sizeof(T*) == sizeof(char*));
    parts_.push_back({reinterpret_cast<char**>(&to), bytes_});
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }
  void make() {
    data_.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes_), std::align_val_t{kAlign})));
    for (const auto& [to, at] : parts_) {
      char* const place = data_.get() + at;
      __builtin_memcpy(to, &place, sizeof place);
    }
  }

 private:
  static constexpr int64_t kAlign = 64;
  struct Delete {
    void operator()(char* data) const { ::operator delete(data, std::align_val_t{kAlign}); }
  };
  struct Part {
    char** to;
    int64_t at;
  };
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
  std::unique_ptr<char, Delete> data_;
};

// Parts of [0, count), each of `work` multiply-adds, for several threads if there is enough. f(begin, end)
template <class F>
void share(int64_t count, int64_t work, const F& f) {
  const int64_t parts = std::clamp<int64_t>(count * work / kWork, 1, std::min<int64_t>(count, 16));
  if (parts == 1) {
    f(int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    f(begin * count / parts, end * count / parts);
  });
}

// Rows and samples of a pass over the inputs in pieces, by shape alone.
struct Division {
  int64_t row_pieces = 1, sample_pieces = 1, tile;

  Division(const Sizes& s, bool backward, size_t itemsize) {
    const int64_t work = s.B * s.n * s.m * s.d * (backward ? 2 : 1);
    const auto halves = [](int64_t most) {  // the power of two up to 8
      int64_t pieces = 1;
      while (pieces < 8 && 2 * pieces <= most) {
        pieces *= 2;
      }
      return pieces;
    };
    const int64_t pieces = halves(work / kWork), rows = halves(std::min(pieces, s.n / 64));
    if (backward) {  // each piece of samples has sums of its own for all parameters of rows
      row_pieces = rows;
      sample_pieces = halves(std::min(pieces / row_pieces, s.B / 4));
    } else {
      sample_pieces = halves(std::min(pieces, s.B));
      row_pieces = std::min(rows, pieces / sample_pieces);
    }
    const int64_t fit = (int64_t{1} << 15) / static_cast<int64_t>(itemsize) / s.d / 12 * 12;
    tile = std::clamp<int64_t>(fit, 24, 96);
  }
  int64_t pieces() const { return row_pieces * sample_pieces; }
  int64_t tiles(int64_t rows) const { return (rows + tile - 1) / tile; }
};

struct Piece {
  int64_t number, row, sample, first_row, last_row, first_sample, last_sample;
};

template <class F>
void each_piece(const Sizes& s, const Division& div, const F& f) {
  const auto one = [&](int64_t k) {
    const int64_t r = k % div.row_pieces, q = k / div.row_pieces;
    f(Piece{k, r, q, r * s.n / div.row_pieces, (r + 1) * s.n / div.row_pieces, q * s.B / div.sample_pieces,
            (q + 1) * s.B / div.sample_pieces});
  };
  if (div.pieces() == 1) {
    one(0);
    return;
  }
  torch::stable::parallel_for(0, div.pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      one(k);
    }
  });
}

// A product per tile of rows, summed over the tiles of a sample: in T over a few, and over those in double. One running sum
// of T over a hundred thousand rows would be ten times less accurate.
template <class T>
class TileSum {
 public:
  // `part` and `total`: memory for `count` numbers, of which short sums make no use
  TileSum(T* out, T* part, double* total, int64_t count, int64_t tiles)
      : out_(out), part_(part), total_(total), count_(count), tiles_(tiles) {}
  // c += a b, of the next tile
  void add(Gemm<T> product) {
    product.c = is_short() ? out_ : part_;
    product.add = at_ % kTiles != 0;
    kernels<T>().gemm(product);
    ++at_;
    if (is_short() || (at_ % kTiles != 0 && at_ < tiles_)) {
      return;
    }
    for (int64_t k = 0; k < count_; ++k) {
      total_[k] = (at_ <= kTiles ? 0 : total_[k]) + part_[k];
    }
    if (at_ == tiles_) {
      std::copy_n(total_, count_, out_);
    }
  }

 private:
  static constexpr int64_t kTiles = 8;
  bool is_short() const { return tiles_ <= kTiles; }
  T *out_, *part_;
  double* total_;
  int64_t count_, tiles_, at_ = 0;
};

// Sums over samples, of `count` numbers each: f(b, to) adds those of a sample. In runs of so many, added up afterwards.
constexpr int64_t kSamples = 32;
template <class T, class F>
void sum_samples(int64_t B, T* out, T* part, int64_t count, const F& f) {
  for (int64_t b = 0; b < B; ++b) {
    if (B > kSamples && b % kSamples == 0) {
      std::fill_n(part, count, T(0));
    }
    f(b, B > kSamples ? part : out);
    if (B > kSamples && (b % kSamples == kSamples - 1 || b == B - 1)) {
      kernels<T>().add_scaled(out, T(1), part, count);
    }
  }
}

// b(k, j) = b[k bk + j bj], packed where it is used often enough to pay or lies columns first.
template <class T>
class Operand {
 public:
  Operand(int64_t terms, int64_t columns, int64_t rows, bool columns_first)
      : terms_(terms), columns_(columns), packs_(columns_first || rows >= kWorthPacking) {}
  void reserve(Workspace& space, int64_t copies = 1) {
    const int64_t panel = kernels<T>().panel;
    size_ = packs_ ? (columns_ + panel - 1) / panel * panel * terms_ : 0;
    space.want(packed_, size_ * copies);
  }
  // For the copy of that number.
  void set(const T* b, int64_t bk, int64_t bj, int64_t copy = 0) const {
    if (packs_) {
      kernels<T>().pack(packed_ + copy * size_, b, bk, bj, terms_, columns_);
    }
  }
  // c (+)= a b; `raw` is b again, with its row stride, where it was not packed
  void multiply(T* c, int64_t ldc, const T* a, int64_t ai, int64_t ak, int64_t rows, bool add, const T* raw,
                int64_t ldb, int64_t copy = 0) const {
    kernels<T>().gemm({c, ldc, a, ai, ak, packs_ ? packed_ + copy * size_ : raw, ldb, rows, columns_, terms_,
                       add, packs_});
  }

 private:
  int64_t terms_, columns_, size_ = 0;
  bool packs_;
  T* packed_ = nullptr;
};

// f(first row, rows, its output) for rows [begin, end) of [B m], cut where a sample ends
template <class F>
void by_sample(int64_t begin, int64_t end, int64_t m, const F& f) {
  for (int64_t k = begin; k < end;) {
    const int64_t j = k % m, rows = std::min(m - j, end - k);
    f(k, rows, j);
    k += rows;
  }
}

// ------------------------------------------------------------------------------------------------------------- forward

template <class T>
class Forward {
 public:
  Forward(const Call<T>& call, T* out, T* kept)
      : c(call), s(call.s), kernel(kernels<T>()), div(s, false, sizeof(T)), out_(out), kept_(kept, s),
        by_F2(s.d, s.h, s.outputs(), false), by_G1(s.h, s.d, s.outputs(), false), by_P(s.d, s.m, s.n, true) {
    const bool again = s.iterations > 1;
    by_F2.reserve(space);
    by_G1.reserve(space);
    by_P.reserve(space, again ? div.pieces() : 0);
    space.want(P, again ? s.outputs() * s.d : 0);
    space.want(U, s.outputs() * s.d);
    space.want(z, again ? s.outputs() * s.h : 0);
    space.want(M_parts, div.row_pieces > 1 ? div.row_pieces * s.outputs() * s.d : 0);
    space.want(p_parts, div.row_pieces * s.outputs());
    space.want(blocks, div.pieces() * div.tile * s.m);
    space.want(scratch, div.pieces() * 4 * s.m);
    space.want(part, div.pieces() * s.m * s.d);
    space.want(total, div.pieces() * s.m * s.d);
    space.make();
  }

  void run() {
    by_F2.set(c.W_F2, s.h, 1);
    if (s.iterations > 1) {
      by_G1.set(c.W_G1, s.d, 1);
    }
    for (int64_t t = 0; t < s.iterations; ++t) {
      each_piece(s, div, [&](const Piece& piece) { pass(piece, t); });
      share(s.outputs(), 2 * s.d * s.h, [&](int64_t begin, int64_t end) { outputs(begin, end, t); });
    }
  }

 private:
  void pass(const Piece& piece, int64_t t) const {
    const int64_t n = s.n, m = s.m, d = s.d;
    T *block = blocks + piece.number * div.tile * m, *group = scratch + piece.number * 4 * m;
    Rows<T> a{};
    a.m = a.ld = m;
    a.block = block;
    a.prior = c.prior;
    a.p = group;
    a.scratch = group + m;
    for (int64_t b = piece.first_sample; b < piece.last_sample; ++b) {
      if (t > 0) {
        by_P.set(P + b * m * d, 1, d, piece.number);
      }
      T* M = (div.row_pieces > 1 ? M_parts + piece.row * s.outputs() * d : kept_.M + t * s.outputs() * d) + b * m * d;
      double* p = p_parts + piece.row * s.outputs() + b * m;
      std::fill_n(p, m, 0.0);
      const int64_t at_piece = piece.number * m * d;
      TileSum<T> M_sum(M, part + at_piece, total + at_piece, m * d, div.tiles(piece.last_row - piece.first_row));
      for (int64_t start = piece.first_row; start < piece.last_row; start += div.tile) {
        const int64_t count = std::min(div.tile, piece.last_row - start);
        const T* x = c.x + b * c.x_batch + start * c.x_row;
        T* gate = kept_.gate + b * n + start;
        if (t == 0) {
          kernel.make_gates(gate, x, c.x_row, c.W_A + start * d, c.B_A + start, c.scale, count, d);
        } else {
          by_P.multiply(block, m, x, c.x_row, 1, count, false, nullptr, 0, piece.number);
        }
        for (int64_t i = 0; i < count; i += kGroup) {
          const int64_t at = (start + i) * m;
          a.rows = std::min(kGroup, count - i);
          a.block = block + i * m;
          a.use = c.use + at;
          a.ign = c.ign + at;
          a.w = c.W_S + at;
          a.b = c.B_S + at;
          a.gate = gate + i;
          std::fill_n(group, m, T(0));
          kernel.forward[t == 0](a);
          for (int64_t j = 0; j < m; ++j) {
            p[j] += group[j];
          }
        }
        M_sum.add({nullptr, d, block, 1, m, x, c.x_row, m, d, count, false, false});
      }
    }
  }

  // Outputs [begin, end) of [B m], from their moments; and what they predict.
  void outputs(int64_t begin, int64_t end, int64_t t) const {
    const int64_t m = s.m, d = s.d, h = s.h, all = s.outputs(), rows = end - begin;
    T *M = kept_.M + t * all * d, *p = kept_.p + t * all, *y = kept_.y + t * all * h;
    for (int64_t k = begin; k < end; ++k) {
      double sum = 0;
      for (int64_t r = 0; r < div.row_pieces; ++r) {
        sum += p_parts[r * all + k];
      }
      p[k] = static_cast<T>(sum);
    }
    if (div.row_pieces > 1) {
      std::copy(M_parts + begin * d, M_parts + end * d, M + begin * d);
      for (int64_t r = 1; r < div.row_pieces; ++r) {
        kernel.add_scaled(M + begin * d, T(1), M_parts + (r * all + begin) * d, rows * d);
      }
    }
    by_sample(begin, end, m, [&](int64_t k, int64_t count, int64_t j) {
      kernel.multiply(U + k * d, M + k * d, c.W_F1 + j * d, c.scale, count * d);
    });
    by_F2.multiply(y + begin * h, h, U + begin * d, d, 1, rows, false, c.W_F2, h);
    for (int64_t k = begin; k < end; ++k) {
      kernel.add_scaled(y + k * h, p[k], c.B_F2 + k % m * h, h);
    }
    if (t + 1 == s.iterations) {
      if (c.normalize) {
        kernel.norm(out_ + begin * h, y + begin * h, rows, h);
      } else {
        std::copy(y + begin * h, y + end * h, out_ + begin * h);
      }
      return;
    }
    kernel.norm(z + begin * h, y + begin * h, rows, h);
    by_G1.multiply(P + begin * d, d, z + begin * h, h, 1, rows, false, c.W_G1, d);
    by_sample(begin, end, m, [&](int64_t k, int64_t count, int64_t j) {
      kernel.multiply_add(P + k * d, P + k * d, c.W_G2 + j * d, c.B_G2 + j * d, count * d);
    });
  }

  const Call<T>& c;
  const Sizes& s;
  const Kernels<T>& kernel;
  const Division div;
  T* const out_;
  const Kept<T> kept_;
  Workspace space;
  Operand<T> by_F2, by_G1, by_P;
  T *P, *U, *z, *M_parts, *blocks, *scratch, *part;
  double *p_parts, *total;
};

// ------------------------------------------------------------------------------------------------------------ backward

// Gradients of the parameters; those with a row per input may be unwanted (null), all together.
template <class T>
struct Gradients {
  T *x, *W_A, *B_A, *W_F1, *W_F2, *B_F2, *W_G1, *W_G2, *B_G2, *W_S, *B_S, *use, *ign;
};

template <class T>
class Backward {
 public:
  Backward(const Call<T>& call, const T* dout, T* kept, const Gradients<T>& gradients)
      : c(call), s(call.s), kernel(kernels<T>()), div(s, true, sizeof(T)), dout_(dout), kept_(kept, s), g(gradients),
        by_F2(s.h, s.d, s.outputs(), true), by_G1(s.h, s.d, s.outputs(), false), to_z(s.d, s.h, s.outputs(), true),
        by_dy(s.outputs(), s.h, s.d, false), by_dQ(s.outputs(), s.d, s.h, false), by_stack(s.d, 2 * s.m, s.n, true),
        by_dM(s.d, s.m, s.n, true), to_x(2 * s.m, s.d, s.n / div.row_pieces, false),
        to_x_first(s.m, s.d, s.n / div.row_pieces, false) {
    const bool again = s.iterations > 1;
    const int64_t all = s.outputs(), pieces = div.pieces();
    by_F2.reserve(space);
    by_dy.reserve(space);
    for (Operand<T>* one : {&by_G1, &to_z, &by_dQ}) {
      one->reserve(space, again);
    }
    by_stack.reserve(space, again ? pieces : 0);
    by_dM.reserve(space, pieces);
    to_x.reserve(space, again && g.x != nullptr ? pieces : 0);
    to_x_first.reserve(space, g.x != nullptr ? pieces : 0);
    space.want(dy, all * s.h);
    space.want(U, all * s.d);
    space.want(dM, all * s.d);
    space.want(dp, all);
    space.want(dgate, s.B * s.n);
    space.want(z, again ? all * s.h : 0);
    space.want(Q, again ? all * s.d : 0);
    space.want(P, again ? all * s.d : 0);
    space.want(dP, again ? all * s.d * div.row_pieces : 0);
    space.want(stack, again ? pieces * 2 * s.m * s.d : 0);
    space.want(blocks, pieces * div.tile * 2 * s.m);
    space.want(scratch, pieces * 7 * s.m);
    space.want(part, again ? pieces * s.m * s.d : 0);
    space.want(total, again ? pieces * s.m * s.d : 0);
    space.want(sums, s.B > kSamples ? s.m * (s.d + std::max(s.d, s.h)) : 0);
    per_row_ = g.use == nullptr ? 0 : s.n * (4 * s.m + s.d + 1);
    space.want(row_parts, (div.sample_pieces - 1) * per_row_);
    space.make();
  }

  void run() {
    by_F2.set(c.W_F2, 1, s.h);
    if (s.iterations > 1) {
      by_G1.set(c.W_G1, s.d, 1);
      to_z.set(c.W_G1, 1, s.d);
    }
    const int64_t last = s.iterations - 1, all = s.outputs();
    if (c.normalize) {
      kernel.norm_backward(dy, dout_, kept_.y + last * all * s.h, all, s.h);
    } else {
      std::copy_n(dout_, all * s.h, dy);
    }
    for (int64_t t = last; t >= 0; --t) {
      outputs(t);
      if (t == 0 && g.use == nullptr && g.x == nullptr) {
        return;
      }
      if (t > 0) {
        share(all, s.d * s.h, [&](int64_t begin, int64_t end) { predictions(begin, end, t - 1); });
      }
      each_piece(s, div, [&](const Piece& piece) { pass(piece, t); });
      if (t > 0) {
        predictors(t);
      }
    }
    add_row_parts();
  }

 private:
  // dU, dF1, dF2, dB_F2, dM and dp of iteration t from dy
  void outputs(int64_t t) const {
    const int64_t m = s.m, d = s.d, h = s.h, all = s.outputs();
    const T *M = kept_.M + t * all * d, *p = kept_.p + t * all;
    const bool add = t + 1 < s.iterations;
    share(all, d * h, [&](int64_t begin, int64_t end) {
      by_F2.multiply(dM + begin * d, d, dy + begin * h, h, 1, end - begin, false, nullptr, 0);
      by_sample(begin, end, m, [&](int64_t k, int64_t count, int64_t j) {
        kernel.multiply(U + k * d, M + k * d, c.W_F1 + j * d, c.scale, count * d);
      });
      for (int64_t k = begin; k < end; ++k) {
        dp[k] = kernel.dot(dy + k * h, c.B_F2 + k % m * h, h);
      }
    });
    if (!add) {
      std::fill_n(g.W_F1, m * d, T(0));
      std::fill_n(g.B_F2, m * h, T(0));
    }
    by_dy.set(dy, h, 1);
    share(d, all * h, [&](int64_t begin, int64_t end) {
      by_dy.multiply(g.W_F2 + begin * h, h, U + begin, 1, d, end - begin, add, dy, h);
    });
    share(m, s.B * (2 * d + h), [&](int64_t begin, int64_t end) {
      const int64_t wide = (end - begin) * d, high = (end - begin) * h;
      sum_samples(s.B, g.W_F1 + begin * d, sums + begin * d, wide, [&](int64_t b, T* to) {
        const int64_t k = (b * m + begin) * d;
        kernel.multiply(U + k, M + k, dM + k, c.scale, wide);
        kernel.add_scaled(to, T(1), U + k, wide);
        kernel.multiply(dM + k, dM + k, c.W_F1 + begin * d, c.scale, wide);
      });
      sum_samples(s.B, g.B_F2 + begin * h, sums + m * d + begin * h, high, [&](int64_t b, T* to) {
        for (int64_t j = begin; j < end; ++j) {
          kernel.add_scaled(to + (j - begin) * h, p[b * m + j], dy + (b * m + j) * h, h);
        }
      });
    });
  }

  // z, Q and P again, from y of iteration t
  void predictions(int64_t begin, int64_t end, int64_t t) const {
    const int64_t d = s.d, h = s.h, rows = end - begin;
    kernel.norm(z + begin * h, kept_.y + (t * s.outputs() + begin) * h, rows, h);
    by_G1.multiply(Q + begin * d, d, z + begin * h, h, 1, rows, false, c.W_G1, d);
    by_sample(begin, end, s.m, [&](int64_t k, int64_t count, int64_t j) {
      kernel.multiply_add(P + k * d, Q + k * d, c.W_G2 + j * d, c.B_G2 + j * d, count * d);
    });
  }

  void pass(const Piece& piece, int64_t t) const {
    const int64_t n = s.n, m = s.m, d = s.d, ld = t == 0 ? m : 2 * m;
    const bool fresh = t + 1 == s.iterations;
    T* block = blocks + piece.number * div.tile * 2 * m;
    T *own = scratch + piece.number * 7 * m, *dump = own + 3 * m;  // dump: rows that nobody wants, one for each kind
    const Gradients<T> to = of_piece(piece.sample);
    const bool wants = to.use != nullptr;
    const T* stacked = nullptr;
    Rows<T> a{};
    a.m = m;
    a.ld = ld;
    a.prior = c.prior;
    a.scratch = own;
    a.wants = wants ? 1 : 0;
    a.adds_gate = !fresh;
    const Operand<T>&to_block = t == 0 ? by_dM : by_stack, &spread = t == 0 ? to_x_first : to_x;
    for (int64_t b = piece.first_sample; b < piece.last_sample; ++b) {
      if (t == 0) {
        stacked = dM + b * m * d;
      } else {
        T* both = stack + piece.number * 2 * m * d;
        std::copy_n(P + b * m * d, m * d, both);
        std::copy_n(dM + b * m * d, m * d, both + m * d);
        stacked = both;
      }
      to_block.set(stacked, 1, d, piece.number);
      if (g.x != nullptr) {
        spread.set(stacked, d, 1, piece.number);
      }
      a.dp = dp + b * m;
      const bool adds = wants && !(fresh && b == piece.first_sample);
      const int64_t at_piece = piece.number * m * d;
      TileSum<T> dP_sum(t == 0 ? nullptr : dP + (piece.row * s.B + b) * m * d, part + at_piece, total + at_piece, m * d,
                        div.tiles(piece.last_row - piece.first_row));
      for (int64_t start = piece.first_row; start < piece.last_row; start += div.tile) {
        const int64_t count = std::min(div.tile, piece.last_row - start), at = start * m;
        const T* x = c.x + b * c.x_batch + start * c.x_row;
        T* dx = g.x == nullptr ? nullptr : g.x + (b * n + start) * d;
        to_block.multiply(block, ld, x, c.x_row, 1, count, false, nullptr, 0, piece.number);
        a.rows = count;
        a.block = block;
        a.use = c.use + at;
        a.ign = c.ign + at;
        a.w = c.W_S + at;
        a.b = c.B_S + at;
        a.gate = kept_.gate + b * n + start;
        a.dgate = dgate + b * n + start;
        a.duse = wants ? to.use + at : dump;
        a.dign = wants ? to.ign + at : dump + m;
        a.dw = wants ? to.W_S + at : dump + 2 * m;
        a.db = wants ? to.B_S + at : dump + 3 * m;
        kernel.backward[t == 0][adds](a);
        if (t > 0) {
          dP_sum.add({nullptr, d, block, 1, ld, x, c.x_row, m, d, count, false, false});
        }
        if (dx != nullptr) {
          spread.multiply(dx, d, block, ld, 1, count, !fresh, stacked, d, piece.number);
        }
        if (t == 0) {
          kernel.gate_gradients({count, d, a.dgate, a.gate, x, c.x_row, c.W_A + start * d, c.scale,
                                 wants ? to.W_A + start * d : nullptr, wants ? to.B_A + start : nullptr, dx,
                                 b > piece.first_sample});
        }
      }
    }
  }

  // dG1, dG2, dB_G2 from dP, and dy of the iteration before
  void predictors(int64_t t) const {
    const int64_t m = s.m, d = s.d, h = s.h, all = s.outputs();
    const bool add = t + 1 < s.iterations;
    const T* y = kept_.y + (t - 1) * all * h;
    T* dQ = U;
    share(all, d * h, [&](int64_t begin, int64_t end) {
      for (int64_t r = 1; r < div.row_pieces; ++r) {
        kernel.add_scaled(dP + begin * d, T(1), dP + (r * all + begin) * d, (end - begin) * d);
      }
      by_sample(begin, end, m, [&](int64_t k, int64_t count, int64_t j) {
        kernel.multiply(dQ + k * d, dP + k * d, c.W_G2 + j * d, T(1), count * d);
      });
      to_z.multiply(dy + begin * h, h, dQ + begin * d, d, 1, end - begin, false, nullptr, 0);
      kernel.norm_backward(dy + begin * h, dy + begin * h, y + begin * h, end - begin, h);
    });
    if (!add) {
      std::fill_n(g.W_G2, m * d, T(0));
      std::fill_n(g.B_G2, m * d, T(0));
    }
    by_dQ.set(dQ, d, 1);
    share(h, all * d, [&](int64_t begin, int64_t end) {
      by_dQ.multiply(g.W_G1 + begin * d, d, z + begin, 1, h, end - begin, add, dQ, d);
    });
    share(m, s.B * 2 * d, [&](int64_t begin, int64_t end) {
      const int64_t wide = (end - begin) * d, at = begin * d;
      sum_samples(s.B, g.B_G2 + at, sums + at, wide, [&](int64_t b, T* to) {
        kernel.add_scaled(to, T(1), dP + b * m * d + at, wide);
      });
      sum_samples(s.B, g.W_G2 + at, sums + m * d + at, wide, [&](int64_t b, T* to) {
        kernel.add_product(to, dP + b * m * d + at, Q + b * m * d + at, wide);
      });
    });
  }

  // Where a piece of samples sums the gradients of rows: the first one in the results, the others apart.
  Gradients<T> of_piece(int64_t sample_piece) const {
    Gradients<T> to = g;
    if (sample_piece > 0 && g.use != nullptr) {
      T* at = row_parts + (sample_piece - 1) * per_row_;
      for (T** one : {&to.use, &to.ign, &to.W_S, &to.B_S}) {
        *one = at;
        at += s.n * s.m;
      }
      to.W_A = at;
      to.B_A = at + s.n * s.d;
    }
    return to;
  }

  void add_row_parts() const {
    if (g.use == nullptr) {
      return;
    }
    const int64_t width = s.n * s.m;
    for (int64_t q = 1; q < div.sample_pieces; ++q) {
      const Gradients<T> part = of_piece(q);
      kernel.add_scaled(g.use, T(1), part.use, width);
      kernel.add_scaled(g.ign, T(1), part.ign, width);
      if (s.iterations > 1) {
        kernel.add_scaled(g.W_S, T(1), part.W_S, width);
        kernel.add_scaled(g.B_S, T(1), part.B_S, width);
      }
      kernel.add_scaled(g.W_A, T(1), part.W_A, s.n * s.d);
      kernel.add_scaled(g.B_A, T(1), part.B_A, s.n);
    }
  }

  const Call<T>& c;
  const Sizes& s;
  const Kernels<T>& kernel;
  const Division div;
  const T* const dout_;
  const Kept<T> kept_;
  const Gradients<T>& g;
  Workspace space;
  Operand<T> by_F2, by_G1, to_z, by_dy, by_dQ, by_stack, by_dM, to_x, to_x_first;
  int64_t per_row_;
  T *dy, *U, *dM, *dp, *dgate, *z, *Q, *P, *dP, *stack, *blocks, *scratch, *row_parts, *part, *sums;
  double* total;
};

// ----------------------------------------------------------------------------------------------------------------- ops

struct Arguments {
  const Tensor &x, &W_A, &B_A, &W_F1, &W_F2, &B_F2, &W_G1, &W_G2, &B_G2, &W_S, &B_S, &use, &ign, &prior;
  int64_t n_iters;
  bool normalize;
};

Sizes checked(const Check& check, const Arguments& in) {
  const ScalarType type = in.x.scalar_type();
  check.tensor("x", in.x, {ScalarType::Float, ScalarType::Double}, {kAny, kAny, kAny}, Layout::kRows);
  check.axes("W_F1", in.W_F1, 2);
  check.axes("W_F2", in.W_F2, 2);
  const int64_t B = in.x.size(0), n = in.x.size(1), d = in.x.size(2), m = in.W_F1.size(0), h = in.W_F2.size(1);
  check.that(std::min({B, n, m, d, h}) >= 1, "x, W_F1, W_F2: expected none empty");
  check.that(in.n_iters >= 1 && in.n_iters < (int64_t{1} << 20), "n_iters: expected at least 1");
  check.tensor("W_A", in.W_A, type, {n, d});
  check.tensor("B_A", in.B_A, type, {n});
  check.tensor("W_F1", in.W_F1, type, {m, d});
  check.tensor("W_F2", in.W_F2, type, {d, h});
  check.tensor("B_F2", in.B_F2, type, {m, h});
  check.tensor("W_G1", in.W_G1, type, {h, d});
  check.tensor("W_G2", in.W_G2, type, {m, d});
  check.tensor("B_G2", in.B_G2, type, {m, d});
  check.tensor("W_S", in.W_S, type, {n, m});
  check.tensor("B_S", in.B_S, type, {n, m});
  check.tensor("beta_use", in.use, type, {n, m});
  check.tensor("beta_ign", in.ign, type, {n, m});
  check.tensor("prior", in.prior, type, {m});
  return {B, n, m, d, h, in.n_iters};
}

template <class T>
Call<T> call_of(const Arguments& in, const Sizes& s) {
  const auto at = [](const Tensor& t) { return static_cast<const T*>(t.data_ptr()); };
  return {s, in.normalize, static_cast<T>(1 / __builtin_sqrt(static_cast<double>(s.n))), at(in.x), in.x.stride(0),
          in.x.stride(1), at(in.W_A), at(in.B_A), at(in.W_F1), at(in.W_F2), at(in.B_F2), at(in.W_G1), at(in.W_G2),
          at(in.B_G2), at(in.W_S), at(in.B_S), at(in.use), at(in.ign), at(in.prior)};
}

template <class F>
void with_type(ScalarType type, const F& f) {
  type == ScalarType::Double ? f(double()) : f(float());
}

std::tuple<Tensor, Tensor> forward_op(
    const Tensor& x, const Tensor& W_A, const Tensor& B_A, const Tensor& W_F1, const Tensor& W_F2, const Tensor& B_F2,
    const Tensor& W_G1, const Tensor& W_G2, const Tensor& B_G2, const Tensor& W_S, const Tensor& B_S, const Tensor& use,
    const Tensor& ign, const Tensor& prior, int64_t n_iters, bool normalize) {
  const Arguments in{x, W_A, B_A, W_F1, W_F2, B_F2, W_G1, W_G2, B_G2, W_S, B_S, use, ign, prior, n_iters, normalize};
  const Sizes s = checked(Check("efficient_routing"), in);
  const ScalarType type = x.scalar_type();
  Tensor out = empty_cpu<3>({s.B, s.m, s.h}, type), kept = empty_cpu<1>({s.kept()}, type);
  with_type(type, [&](auto t) {
    using T = decltype(t);
    const Call<T> call = call_of<T>(in, s);
    Forward<T>(call, static_cast<T*>(out.data_ptr()), static_cast<T*>(kept.data_ptr())).run();
  });
  return {out, kept};
}

std::vector<Tensor> backward_op(
    const Tensor& x, const Tensor& W_A, const Tensor& B_A, const Tensor& W_F1, const Tensor& W_F2, const Tensor& B_F2,
    const Tensor& W_G1, const Tensor& W_G2, const Tensor& B_G2, const Tensor& W_S, const Tensor& B_S, const Tensor& use,
    const Tensor& ign, const Tensor& prior, int64_t n_iters, bool normalize, const Tensor& dout, const Tensor& kept,
    bool want_x, bool want_rows) {
  const Arguments in{x, W_A, B_A, W_F1, W_F2, B_F2, W_G1, W_G2, B_G2, W_S, B_S, use, ign, prior, n_iters, normalize};
  const Check check("efficient_routing");
  const Sizes s = checked(check, in);
  const ScalarType type = x.scalar_type();
  check.tensor("dout", dout, type, {s.B, s.m, s.h});
  check.tensor("kept", kept, type, {s.kept()});
  const auto rows = [&](int64_t width) { return empty_cpu<2>({want_rows ? s.n : 0, width}, type); };
  // in the order of the arguments
  std::vector<Tensor> made{want_x ? empty_cpu<3>({s.B, s.n, s.d}, type) : empty_cpu<3>({0, s.n, s.d}, type),
                           rows(s.d),
                           empty_cpu<1>({want_rows ? s.n : 0}, type),
                           empty_cpu<2>({s.m, s.d}, type),
                           empty_cpu<2>({s.d, s.h}, type),
                           empty_cpu<2>({s.m, s.h}, type),
                           empty_cpu<2>({s.h, s.d}, type),
                           empty_cpu<2>({s.m, s.d}, type),
                           empty_cpu<2>({s.m, s.d}, type),
                           rows(s.m),
                           rows(s.m),
                           rows(s.m),
                           rows(s.m)};
  with_type(type, [&](auto t) {
    using T = decltype(t);
    const auto at = [&](size_t k, bool wanted) { return wanted ? static_cast<T*>(made[k].data_ptr()) : nullptr; };
    const Call<T> call = call_of<T>(in, s);
    const Gradients<T> g{at(0, want_x), at(1, want_rows), at(2, want_rows), at(3, true), at(4, true), at(5, true),
                         at(6, true), at(7, true), at(8, true), at(9, want_rows), at(10, want_rows), at(11, want_rows),
                         at(12, want_rows)};
    if (n_iters == 1) {  // which uses none of these
      for (const size_t k : {size_t{6}, size_t{7}, size_t{8}, size_t{9}, size_t{10}}) {
        std::fill_n(static_cast<T*>(made[k].data_ptr()), made[k].numel(), T(0));
      }
    }
    Backward<T>(call, static_cast<const T*>(dout.data_ptr()), static_cast<T*>(kept.data_ptr()), g).run();
  });
  return made;
}

}  // namespace
}  // namespace fastroute::efficient_routing

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_efficient_routing_native", TORCH_BOX(&fastroute::efficient_routing::forward_op));
  library.impl("_efficient_routing_native_backward", TORCH_BOX(&fastroute::efficient_routing::backward_op));
}

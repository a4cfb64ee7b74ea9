// What both passes of efficient_routing are made of: sizes, the call, memory, how work is divided, sums.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpu/efficient_routing/efficient_routing.h"

namespace fastroute::efficient_routing {

constexpr int64_t kGroup = 16;                // rows of a sum in T; groups are added up in double
constexpr int64_t kWork = int64_t{1} << 19;   // multiply-adds worth a thread's while
constexpr int64_t kHalved = 128;              // from that width on three quarters of a Gram matrix are computed
constexpr int64_t kWorthPacking = 16;         // rows that a packed operand is used for

// How the first iteration is computed: as every other one; with both linear betas in one; from sum_i f_i x_i x_i^T.
enum class First { kPairs, kOneBeta, kGram };

struct Sizes {
  int64_t B, n, m, d, h, iterations;
  bool is_linear, is_masked;  // betas linear in x; pairs masked

  int64_t outputs() const { return B * m; }
  // As first_form in fastroute/ops/efficient_routing/passes.py says where there is "gram".
  First first() const {
    return !is_linear || is_masked || n == 1 ? First::kPairs : d <= 4 * m ? First::kGram : First::kOneBeta;
  }
  int64_t gram() const { return first() == First::kGram ? B * d * d : 0; }
  int64_t gram_vectors() const { return first() == First::kGram ? B * (d + 1) : 0; }
  int64_t kept() const { return B * n + iterations * outputs() * (d + 1 + h) + gram() + gram_vectors(); }
};

// bfloat16 in memory, of which sums are made in T
template <class T>
void widen(T* to, const uint16_t* from, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t bits = static_cast<uint32_t>(from[k]) << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, sizeof wide);
    to[k] = wide;
  }
}
template <class T>
void narrow(uint16_t* to, const T* from, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const float wide = static_cast<float>(from[k]);
    uint32_t bits;
    __builtin_memcpy(&bits, &wide, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    to[k] = static_cast<uint16_t>(wide != wide ? (bits >> 16) | 0x40 : rounded);  // a NaN must not round to infinity
  }
}

template <class T>
struct Vectors {
  const T* x;
  int64_t row;
};

// What both passes are given.
template <class T>
struct Call {
  Sizes s;
  bool normalize;
  const T* x;
  const uint16_t* half_x;  // in bfloat16, in place of x
  int64_t x_batch, x_row;
  const T *W_A, *B_A, *W_F1, *W_F2, *B_F2, *W_G1, *W_G2, *B_G2, *W_S, *B_S, *use, *ign, *use_bias, *ign_bias, *prior;
  const uint8_t* mask;
  int64_t mask_batch, mask_row, mask_column;
  const int64_t* lengths;
  int64_t length_stride;

  int64_t row() const { return s.is_linear ? 0 : 1; }  // parameters of a row of x are so many of a row apart
  int64_t length(int64_t b) const {
    return lengths == nullptr ? s.n : std::clamp<int64_t>(lengths[b * length_stride], 0, s.n);
  }
  // How many of rows [first, last) of a sample there are.
  int64_t live(int64_t b, int64_t first, int64_t last) const { return std::clamp(length(b), first, last) - first; }
  T scale(int64_t b) const {
    const int64_t terms = lengths == nullptr ? s.n : std::max<int64_t>(lengths[b * length_stride], 1);
    return static_cast<T>(1 / __builtin_sqrt(static_cast<double>(terms)));
  }
  bool reaches(int64_t b, int64_t i) const {
    const uint8_t* at = mask + b * mask_batch + i * mask_row;
    for (int64_t j = 0; j < (mask_column == 0 ? 1 : s.m); ++j) {
      if (at[j * mask_column] == 0) {
        return true;
      }
    }
    return false;
  }
  // Numbers of a copy of a tile of x, if any is needed.
  int64_t copied(int64_t tile) const { return mask != nullptr || half_x != nullptr ? tile * s.d : 0; }
  // Rows of a sample. What reaches no output is left out before anything is computed from it: zero, in `copy` [count, d].
  Vectors<T> vectors(int64_t b, int64_t start, int64_t count, T* copy) const {
    const int64_t at = b * x_batch + start * x_row;
    bool as_it_is = half_x == nullptr;
    for (int64_t i = 0; i < count && mask != nullptr && as_it_is; ++i) {
      as_it_is = reaches(b, start + i);
    }
    if (as_it_is) {
      return {x + at, x_row};
    }
    for (int64_t i = 0; i < count; ++i) {
      if (mask != nullptr && !reaches(b, start + i)) {
        std::fill_n(copy + i * s.d, s.d, T(0));
      } else if (half_x != nullptr) {
        widen(copy + i * s.d, half_x + at + i * x_row, s.d);
      } else {
        std::copy_n(x + at + i * x_row, s.d, copy + i * s.d);
      }
    }
    return {copy, s.d};
  }
  // The parameters of rows from `start` on of a sample, into a.
  void parameters(Rows<T>& a, int64_t b, int64_t start) const {
    const int64_t at = start * s.m * row();
    a.use = use + at;
    a.ign = ign + at;
    a.w = W_S + at;
    a.b = B_S + at;
    a.beta_ld = a.score_ld = s.m * row();
    a.use_bias = use_bias;
    a.ign_bias = ign_bias;
    a.prior = prior;
    a.mask = mask == nullptr ? nullptr : mask + b * mask_batch + start * mask_row;
    a.mask_row = mask_row;
    a.mask_column = mask_column;
  }
  void gates(T* gate, const Vectors<T>& of, int64_t b, int64_t start, int64_t count) const {
    const int64_t d = s.d * row();
    kernels<T>().make_gates(gate, of.x, of.row, W_A + start * d, d, B_A + start * row(), row(), scale(b), count, s.d);
  }
};

// One row on in all that has a row of its own.
template <class T>
Rows<T> window(Rows<T> a, int64_t i, int64_t rows) {
  a.rows = rows;
  a.block += i * a.ld;
  a.use += i * a.beta_ld;
  a.ign += i * a.beta_ld;
  a.w += i * a.score_ld;
  a.b += i * a.score_ld;
  a.gate += i;
  a.dgate = a.dgate == nullptr ? nullptr : a.dgate + i;
  a.mask = a.mask == nullptr ? nullptr : a.mask + i * a.mask_row;
  return a;
}

// What the forward pass keeps, in one block.
template <class T>
struct Kept {
  T *gate, *M, *p, *y, *G, *g;  // [B, n], [T, B, m, d], [T, B, m], [T, B, m, h]; in Gram form [B, d, d] and [B, d + 1]

  Kept(T* block, const Sizes& s)
      : gate(block), M(gate + s.B * s.n), p(M + s.iterations * s.outputs() * s.d), y(p + s.iterations * s.outputs()),
        G(y + s.iterations * s.outputs() * s.h), g(G + s.gram()) {}
};

// Both betas of a first iteration in one: v [m, d], e [m].
template <class T>
void one_beta(const Call<T>& c, T* v, T* e) {
  for (int64_t j = 0; j < c.s.m; ++j) {
    const T share = c.prior[j], rest = T(1) - share;
    e[j] = share * c.use_bias[j] - rest * c.ign_bias[j];
    for (int64_t k = j * c.s.d; k < (j + 1) * c.s.d; ++k) {
      v[k] = share * c.use[k] - rest * c.ign[k];
    }
  }
}

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

constexpr int64_t kTiles = 8;  // whose products are added up in T

// Products per tile of rows, summed over the tiles of a sample: in T over a few, and over those in double. One running sum
// of T over a hundred thousand rows would be ten times less accurate.
template <class T>
class TileSum {
 public:
  // `part` and `total`: memory for `count` numbers, of which short sums make no use
  TileSum(T* out, T* part, double* total, int64_t count, int64_t tiles)
      : out_(out), part_(part), total_(total), count_(count), tiles_(tiles) {
    if (tiles == 0) {
      std::fill_n(out, count, T(0));
    }
  }
  T* to() const { return is_short() ? out_ : part_; }
  bool adds() const { return at_ % kTiles != 0; }
  // The next tile's products are in `to`.
  void done() {
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
  bool is_short() const { return tiles_ <= kTiles; }
  T *out_, *part_;
  double* total_;
  int64_t count_, tiles_, at_ = 0;
};

// The same of any number of tiles, added to `total`.
template <class T>
class RunningSum {
 public:
  RunningSum(T* part, double* total, int64_t count) : part_(part), total_(total), count_(count) {}
  T* to() const { return part_; }
  bool adds() const { return at_ > 0; }
  void done() {
    if (++at_ == kTiles) {
      flush();
    }
  }
  void flush() {
    for (int64_t k = 0; k < count_ && at_ > 0; ++k) {
      total_[k] += part_[k];
    }
    at_ = 0;
  }

 private:
  T* part_;
  double* total_;
  int64_t count_, at_ = 0;
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

}  // namespace fastroute::efficient_routing

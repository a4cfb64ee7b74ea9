// The forward pass of efficient_routing, all iterations.
#pragma once

#include "cpu/efficient_routing/passes.h"

namespace fastroute::efficient_routing {

template <class T>
class Forward {
 public:
  Forward(const Call<T>& call, T* out, T* kept)
      : c(call), s(call.s), kernel(kernels<T>()), div(s, false, sizeof(T)), out_(out), kept_(kept, s),
        by_F2(s.d, s.h, s.outputs(), false), by_G1(s.h, s.d, s.outputs(), false), by_P(s.d, s.m, s.n, true),
        by_betas(s.d, 2 * s.m, s.n, true) {
    const bool again = s.iterations > 1, gram = s.first() == First::kGram;
    const int64_t pieces = div.pieces(), of_betas = s.is_linear ? 2 * s.m : 0;
    const bool one = s.is_linear && s.first() != First::kPairs;
    by_F2.reserve(space);
    by_G1.reserve(space);
    by_P.reserve(space, again || one ? pieces : 0);
    by_betas.reserve(space, s.is_linear && (again || !one));
    space.want(betas, of_betas * s.d);
    space.want(v, one ? s.m * s.d : 0);
    space.want(e, one ? s.m : 0);
    space.want(P, again ? s.outputs() * s.d : 0);
    space.want(U, s.outputs() * s.d);
    space.want(z, again ? s.outputs() * s.h : 0);
    space.want(M_parts, div.row_pieces > 1 ? div.row_pieces * s.outputs() * s.d : 0);
    space.want(p_parts, div.row_pieces * s.outputs());
    space.want(G_parts, div.row_pieces > 1 ? div.row_pieces * s.gram() : 0);
    space.want(g_parts, div.row_pieces * s.gram_vectors());
    block_ = div.tile * std::max(s.m + of_betas, gram ? s.d : 0);
    space.want(blocks, pieces * block_);
    space.want(copies, pieces * c.copied(div.tile));
    scratch_ = 5 * s.m + (gram ? s.d : 0);
    space.want(scratch, pieces * scratch_);
    summed_ = std::max(s.m, gram ? s.d : 0) * s.d;
    space.want(part, pieces * summed_);
    space.want(total, pieces * summed_);
    space.make();
  }

  void run() {
    by_F2.set(c.W_F2, s.h, 1);
    if (s.iterations > 1) {
      by_G1.set(c.W_G1, s.d, 1);
    }
    if (s.is_linear) {
      std::copy_n(c.use, s.m * s.d, betas);
      std::copy_n(c.ign, s.m * s.d, betas + s.m * s.d);
      if (s.iterations > 1 || s.first() == First::kPairs) {
        by_betas.set(betas, 1, s.d);
      }
      if (s.first() != First::kPairs) {
        one_beta(c, v, e);
      }
    }
    for (int64_t t = 0; t < s.iterations; ++t) {
      if (t == 0 && s.first() == First::kGram) {
        each_piece(s, div, [&](const Piece& piece) { gram(piece); });
        share(s.B * s.d, s.d, [&](int64_t begin, int64_t end) { gathered(begin, end); });
        mirrored();
      } else {
        each_piece(s, div, [&](const Piece& piece) { pass(piece, t); });
      }
      share(s.outputs(), 2 * s.d * s.h, [&](int64_t begin, int64_t end) { outputs(begin, end, t); });
    }
  }

 private:
  void pass(const Piece& piece, int64_t t) const {
    const int64_t m = s.m, d = s.d;
    const bool one = t == 0 && s.first() == First::kOneBeta, linear = s.is_linear && !one;
    const int64_t scores = t > 0 || one ? m : 0;  // columns of the block before the betas'
    T *block = blocks + piece.number * block_, *group = scratch + piece.number * scratch_;
    T* copy = copies + piece.number * c.copied(div.tile);
    Rows<T> a{};
    a.m = m;
    a.ld = std::max(m, scores + (linear ? 2 * m : 0));
    a.p = group;
    a.scratch = group + m;
    const auto rows = one ? kernel.one_beta_forward : kernel.forward[t == 0][linear][c.mask != nullptr];
    for (int64_t b = piece.first_sample; b < piece.last_sample; ++b) {
      const int64_t live = c.live(b, piece.first_row, piece.last_row), at_piece = piece.number * summed_;
      if (scores > 0 && (t > 0 || b == piece.first_sample)) {
        by_P.set(t > 0 ? P + b * m * d : v, 1, d, piece.number);
      }
      T* M = (div.row_pieces > 1 ? M_parts + piece.row * s.outputs() * d : kept_.M + t * s.outputs() * d) + b * m * d;
      double* p = p_parts + piece.row * s.outputs() + b * m;
      std::fill_n(p, m, 0.0);
      TileSum<T> M_sum(M, part + at_piece, total + at_piece, m * d, div.tiles(live));
      if (t == 0) {
        std::fill_n(kept_.gate + b * s.n + piece.first_row + live, piece.last_row - piece.first_row - live, T(0));
      }
      for (int64_t start = piece.first_row; start < piece.first_row + live; start += div.tile) {
        const int64_t count = std::min(div.tile, piece.first_row + live - start);
        const Vectors<T> x = c.vectors(b, start, count, copy);
        T* gate = kept_.gate + b * s.n + start;
        if (t == 0) {
          c.gates(gate, x, b, start, count);
        }
        if (scores > 0) {
          by_P.multiply(block, a.ld, x.x, x.row, 1, count, false, nullptr, 0, piece.number);
        }
        c.parameters(a, b, start);
        a.block = block;
        a.gate = gate;
        if (linear) {
          by_betas.multiply(block + scores, a.ld, x.x, x.row, 1, count, false, betas, d);
          a.use = block + scores;
          a.ign = a.use + m;
          a.beta_ld = a.ld;
        } else if (one) {
          a.use_bias = e;
        }
        for (int64_t i = 0; i < count; i += kGroup) {
          std::fill_n(group, m, T(0));
          rows(window(a, i, std::min(kGroup, count - i)));
          for (int64_t j = 0; j < m; ++j) {
            p[j] += group[j];
          }
        }
        kernel.gemm({M_sum.to(), d, block, 1, a.ld, x.x, x.row, m, d, count, M_sum.adds(), false});
        M_sum.done();
      }
    }
  }

  // Gates, and G and g of the rows of a piece.
  void gram(const Piece& piece) const {
    const int64_t d = s.d, at_piece = piece.number * summed_, half = d >= kHalved ? d / 2 : 0;
    T *block = blocks + piece.number * block_, *group = scratch + piece.number * scratch_;
    T* copy = copies + piece.number * c.copied(div.tile);
    for (int64_t b = piece.first_sample; b < piece.last_sample; ++b) {
      const int64_t live = c.live(b, piece.first_row, piece.last_row);
      T* G = div.row_pieces > 1 ? G_parts + (piece.row * s.B + b) * d * d : kept_.G + b * d * d;
      double* g = g_parts + (piece.row * s.B + b) * (d + 1);
      std::fill_n(g, d + 1, 0.0);
      TileSum<T> sum(G, part + at_piece, total + at_piece, d * d, div.tiles(live));
      std::fill_n(kept_.gate + b * s.n + piece.first_row + live, piece.last_row - piece.first_row - live, T(0));
      for (int64_t start = piece.first_row; start < piece.first_row + live; start += div.tile) {
        const int64_t count = std::min(div.tile, piece.first_row + live - start);
        const Vectors<T> x = c.vectors(b, start, count, copy);
        T* gate = kept_.gate + b * s.n + start;
        c.gates(gate, x, b, start, count);
        for (int64_t i = 0; i < count; i += kGroup) {
          const int64_t some = std::min(kGroup, count - i);
          std::fill_n(group, d, T(0));
          kernel.weighted(block + i * d, group, x.x + i * x.row, x.row, gate + i, some, d);
          for (int64_t k = 0; k < d; ++k) {
            g[k] += group[k];
          }
          for (int64_t k = 0; k < some; ++k) {
            g[d] += gate[i + k];
          }
        }
        // G is symmetric: three of its four quarters suffice, the fourth is mirrored
        kernel.gemm({sum.to() + half, d, block, 1, d, x.x + half, x.row, d, d - half, count, sum.adds(), false});
        if (half > 0) {
          kernel.gemm({sum.to(), d, block, 1, d, x.x, x.row, half, half, count, sum.adds(), false});
        }
        sum.done();
      }
    }
  }

  // Rows [begin, end) of G [B d, d], from their parts
  void gathered(int64_t begin, int64_t end) const {
    const int64_t d = s.d;
    if (div.row_pieces > 1) {
      std::copy(G_parts + begin * d, G_parts + end * d, kept_.G + begin * d);
      for (int64_t r = 1; r < div.row_pieces; ++r) {
        kernel.add_scaled(kept_.G + begin * d, T(1), G_parts + r * s.gram() + begin * d, (end - begin) * d);
      }
    }
  }

  void mirrored() const {
    const int64_t d = s.d, half = d >= kHalved ? d / 2 : 0;
    for (int64_t b = 0; b < s.B; ++b) {
      T* G = kept_.G + b * d * d;
      for (int64_t i = half; i < d && half > 0; ++i) {
        for (int64_t k = 0; k < half; ++k) {
          G[i * d + k] = G[k * d + i];
        }
      }
    }
    for (int64_t k = 0; k < s.gram_vectors(); ++k) {
      double sum = 0;
      for (int64_t r = 0; r < div.row_pieces; ++r) {
        sum += g_parts[r * s.gram_vectors() + k];
      }
      kept_.g[k] = static_cast<T>(sum);
    }
  }

  // M and p of outputs [begin, end) of [B m], from G and g.
  void first_moments(int64_t begin, int64_t end) const {
    const int64_t m = s.m, d = s.d;
    by_sample(begin, end, m, [&](int64_t k, int64_t count, int64_t j) {
      const T *G = kept_.G + k / m * d * d, *g = kept_.g + k / m * (d + 1);
      T* M = kept_.M + k * d;
      kernel.gemm({M, d, v + j * d, d, 1, G, d, count, d, d, false, false});
      for (int64_t i = 0; i < count; ++i) {
        kernel.add_scaled(M + i * d, e[j + i], g, d);
        kept_.p[k + i] = kernel.dot(g, v + (j + i) * d, d) + e[j + i] * g[d];
      }
    });
  }

  // Outputs [begin, end) of [B m], from their moments; and what they predict.
  void outputs(int64_t begin, int64_t end, int64_t t) const {
    const int64_t m = s.m, d = s.d, h = s.h, all = s.outputs(), rows = end - begin;
    T *M = kept_.M + t * all * d, *p = kept_.p + t * all, *y = kept_.y + t * all * h;
    const bool is_gram = t == 0 && s.first() == First::kGram;
    if (is_gram) {
      first_moments(begin, end);
    }
    for (int64_t k = begin; k < end && !is_gram; ++k) {
      double sum = 0;
      for (int64_t r = 0; r < div.row_pieces; ++r) {
        sum += p_parts[r * all + k];
      }
      p[k] = static_cast<T>(sum);
    }
    if (div.row_pieces > 1 && !is_gram) {
      std::copy(M_parts + begin * d, M_parts + end * d, M + begin * d);
      for (int64_t r = 1; r < div.row_pieces; ++r) {
        kernel.add_scaled(M + begin * d, T(1), M_parts + (r * all + begin) * d, rows * d);
      }
    }
    by_sample(begin, end, m, [&](int64_t k, int64_t count, int64_t j) {
      kernel.multiply(U + k * d, M + k * d, c.W_F1 + j * d, c.scale(k / m), count * d);
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
  Operand<T> by_F2, by_G1, by_P, by_betas;
  int64_t block_, scratch_, summed_;  // numbers of a piece
  T *betas, *v, *e, *P, *U, *z, *M_parts, *G_parts, *blocks, *copies, *scratch, *part;
  double *p_parts, *g_parts, *total;
};

}  // namespace fastroute::efficient_routing

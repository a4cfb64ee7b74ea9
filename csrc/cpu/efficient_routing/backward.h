// The backward pass of efficient_routing, all iterations.
#pragma once

#include "cpu/efficient_routing/passes.h"

namespace fastroute::efficient_routing {

// Gradients of the parameters; those that the passes over the inputs read may be unwanted (null), all together.
template <class T>
struct Gradients {
  T* x;
  uint16_t* half_x;  // in bfloat16, in place of x
  T *W_A, *B_A, *W_F1, *W_F2, *B_F2, *W_G1, *W_G2, *B_G2, *W_S, *B_S, *use, *ign, *use_bias, *ign_bias;

  bool wants_x() const { return x != nullptr || half_x != nullptr; }
};

// Of what all rows share, in double: [use, ign, v] each [m, d]; the biases of use and ign, W_S, B_S, e each [m]; W_A [d], B_A.
struct Shared {
  double *use, *v, *use_bias, *W_S, *e, *W_A;

  static int64_t vectors(const Sizes& s) { return 5 * s.m + s.d + 1; }
  static int64_t numbers(const Sizes& s) { return 3 * s.m * s.d + vectors(s); }
  Shared(double* at, const Sizes& s)
      : use(at), v(use + 2 * s.m * s.d), use_bias(v + s.m * s.d), W_S(use_bias + 2 * s.m), e(W_S + 2 * s.m),
        W_A(e + s.m) {}
};

template <class T>
class Backward {
 public:
  Backward(const Call<T>& call, const T* dout, T* kept, const Gradients<T>& gradients)
      : c(call), s(call.s), kernel(kernels<T>()), div(s, true, sizeof(T)), dout_(dout), kept_(kept, s), g(gradients),
        by_F2(s.h, s.d, s.outputs(), true), by_G1(s.h, s.d, s.outputs(), false), to_z(s.d, s.h, s.outputs(), true),
        by_dy(s.outputs(), s.h, s.d, false), by_dQ(s.outputs(), s.d, s.h, false), by_stack(s.d, 2 * s.m, s.n, true),
        by_dM(s.d, s.m, s.n, true), by_betas(s.d, 2 * s.m, s.n, true), by_sym(s.d, s.d, s.n, false),
        to_x(2 * s.m, s.d, s.n / div.row_pieces, false), to_x_first(s.m, s.d, s.n / div.row_pieces, false),
        betas_to_x(2 * s.m, s.d, s.n, false) {
    const bool again = s.iterations > 1, gram = s.first() == First::kGram;
    const bool one = s.is_linear && s.first() != First::kPairs, two = again || s.first() == First::kOneBeta;
    const bool of_betas = s.is_linear && (again || !one);
    const int64_t all = s.outputs(), pieces = div.pieces();
    by_F2.reserve(space);
    by_dy.reserve(space);
    for (Operand<T>* operand : {&by_G1, &to_z, &by_dQ}) {
      operand->reserve(space, again);
    }
    by_stack.reserve(space, two ? pieces : 0);
    by_dM.reserve(space, pieces);
    by_betas.reserve(space, of_betas);
    by_sym.reserve(space, gram ? pieces : 0);
    to_x.reserve(space, two && g.wants_x() ? pieces : 0);
    to_x_first.reserve(space, g.wants_x() ? pieces : 0);
    betas_to_x.reserve(space, of_betas && g.wants_x());
    space.want(dy, all * s.h);
    space.want(U, all * s.d);
    space.want(dM, all * s.d);
    space.want(dp, all);
    space.want(dgate, s.B * s.n);
    space.want(z, again ? all * s.h : 0);
    space.want(Q, again ? all * s.d : 0);
    space.want(P, again ? all * s.d : 0);
    space.want(dP, again ? all * s.d * div.row_pieces : 0);
    space.want(betas, of_betas ? 2 * s.m * s.d : 0);
    space.want(v, one ? s.m * s.d : 0);
    space.want(e, one ? s.m : 0);
    space.want(dv, gram ? s.m * (s.d + 1) : 0);
    space.want(sym, s.gram());
    space.want(dg, s.gram_vectors());
    space.want(stack, two ? pieces * 2 * s.m * s.d : 0);
    block_ = div.tile * std::max((two ? 2 : 1) * s.m + (of_betas ? 2 * s.m : 0), gram ? s.d : 0);
    space.want(blocks, pieces * block_);
    space.want(copies, pieces * c.copied(div.tile));
    space.want(dx_tiles, g.half_x != nullptr ? pieces * div.tile * s.d : 0);
    scratch_ = 8 * s.m + (s.is_linear ? Shared::vectors(s) : 0);
    space.want(scratch, pieces * scratch_);
    space.want(part, again ? pieces * s.m * s.d : 0);
    space.want(total, again ? pieces * s.m * s.d : 0);
    space.want(beta_part, s.is_linear ? pieces * 2 * s.m * s.d : 0);
    space.want(shared, s.is_linear ? pieces * Shared::numbers(s) : 0);
    space.want(sums, s.B > kSamples ? s.m * (s.d + std::max(s.d, s.h)) : 0);
    per_row_ = g.use == nullptr || s.is_linear ? 0 : s.n * (4 * s.m + s.d + 1);
    space.want(row_parts, (div.sample_pieces - 1) * per_row_);
    space.make();
  }

  void run() {
    by_F2.set(c.W_F2, 1, s.h);
    if (s.iterations > 1) {
      by_G1.set(c.W_G1, s.d, 1);
      to_z.set(c.W_G1, 1, s.d);
    }
    if (s.is_linear) {
      prepare_betas();
    }
    const int64_t last = s.iterations - 1, all = s.outputs();
    if (c.normalize) {
      kernel.norm_backward(dy, dout_, kept_.y + last * all * s.h, all, s.h);
    } else {
      std::copy_n(dout_, all * s.h, dy);
    }
    for (int64_t t = last; t >= 0; --t) {
      outputs(t);
      if (t == 0 && g.use == nullptr && !g.wants_x()) {
        return;
      }
      if (t > 0) {
        share(all, s.d * s.h, [&](int64_t begin, int64_t end) { predictions(begin, end, t - 1); });
      }
      if (t == 0 && s.first() == First::kGram) {
        gram_gradients();
        each_piece(s, div, [&](const Piece& piece) { gram(piece); });
      } else {
        each_piece(s, div, [&](const Piece& piece) { pass(piece, t); });
      }
      if (t > 0) {
        predictors(t);
      }
    }
    if (s.is_linear) {
      add_shared();
    } else {
      add_row_parts();
    }
  }

 private:
  void prepare_betas() const {
    if (s.iterations > 1 || s.first() == First::kPairs) {
      std::copy_n(c.use, s.m * s.d, betas);
      std::copy_n(c.ign, s.m * s.d, betas + s.m * s.d);
      by_betas.set(betas, 1, s.d);
      if (g.wants_x()) {
        betas_to_x.set(betas, s.d, 1);
      }
    }
    if (s.first() != First::kPairs) {
      one_beta(c, v, e);
    }
    std::fill_n(shared, div.pieces() * Shared::numbers(s), 0.0);
  }

  // dU, dF1, dF2, dB_F2, dM and dp of iteration t from dy
  void outputs(int64_t t) const {
    const int64_t m = s.m, d = s.d, h = s.h, all = s.outputs();
    const T *M = kept_.M + t * all * d, *p = kept_.p + t * all;
    const bool add = t + 1 < s.iterations;
    share(all, d * h, [&](int64_t begin, int64_t end) {
      by_F2.multiply(dM + begin * d, d, dy + begin * h, h, 1, end - begin, false, nullptr, 0);
      by_sample(begin, end, m, [&](int64_t k, int64_t count, int64_t j) {
        kernel.multiply(U + k * d, M + k * d, c.W_F1 + j * d, c.scale(k / m), count * d);
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
        kernel.multiply(U + k, M + k, dM + k, c.scale(b), wide);
        kernel.add_scaled(to, T(1), U + k, wide);
        kernel.multiply(dM + k, dM + k, c.W_F1 + begin * d, c.scale(b), wide);
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
    const int64_t n = s.n, m = s.m, d = s.d;
    const bool one = t == 0 && s.first() == First::kOneBeta, linear = s.is_linear && !one, two = t > 0 || one;
    const bool fresh = t + 1 == s.iterations;
    const int64_t before_betas = two ? 2 * m : m, ld = before_betas + (linear ? 2 * m : 0);
    T *block = blocks + piece.number * block_, *copy = copies + piece.number * c.copied(div.tile);
    T *own = scratch + piece.number * scratch_, *dump = own + 4 * m;  // dump: rows that nobody wants, one for each kind
    T* group = dump + 4 * m;  // of linear betas, the sums of a few rows: as Shared's vectors
    const Gradients<T> to = of_piece(piece.sample);
    const bool wants = to.use != nullptr, wants_rows = wants && !s.is_linear;
    Shared sum(s.is_linear ? shared + piece.number * Shared::numbers(s) : nullptr, s);
    RunningSum<T> beta_sum(beta_part + piece.number * 2 * m * d, one ? sum.v : sum.use, (one ? 1 : 2) * m * d);
    Rows<T> a{};
    a.m = m;
    a.ld = ld;
    a.scratch = own;
    a.wants = wants ? 1 : 0;
    a.adds_gate = !fresh;
    const Operand<T>&to_block = two ? by_stack : by_dM, &spread = two ? to_x : to_x_first;
    if (wants_rows && fresh && c.lengths != nullptr) {  // rows that no sample of the piece has
      clear_rows(to, piece);
    }
    for (int64_t b = piece.first_sample; b < piece.last_sample; ++b) {
      const int64_t live = c.live(b, piece.first_row, piece.last_row), end = piece.first_row + live;
      const T* stacked = dM + b * m * d;
      if (two) {
        T* both = stack + piece.number * 2 * m * d;
        std::copy_n(one ? v : P + b * m * d, m * d, both);
        std::copy_n(dM + b * m * d, m * d, both + m * d);
        stacked = both;
      }
      to_block.set(stacked, 1, d, piece.number);
      if (g.wants_x()) {
        spread.set(stacked, d, 1, piece.number);
      }
      if (fresh) {
        clear_dx(b, end, piece.last_row);
      }
      a.dp = dp + b * m;
      const bool writes = fresh && c.lengths == nullptr && b == piece.first_sample, adds = wants && !writes;
      const auto rows = one ? kernel.one_beta_backward
                            : kernel.backward[t == 0][linear ? 2 : adds ? 1 : 0][c.mask != nullptr];
      const int64_t at_piece = piece.number * m * d;
      T* to_P = t == 0 ? nullptr : dP + (piece.row * s.B + b) * m * d;
      TileSum<T> dP_sum(to_P, part + at_piece, total + at_piece, t == 0 ? 0 : m * d, div.tiles(live));
      for (int64_t start = piece.first_row; start < end; start += div.tile) {
        const int64_t count = std::min(div.tile, end - start), at = start * m;
        const Vectors<T> x = c.vectors(b, start, count, copy);
        T* dx = dx_of(piece, b, start, count, fresh);
        to_block.multiply(block, ld, x.x, x.row, 1, count, false, nullptr, 0, piece.number);
        c.parameters(a, b, start);
        a.rows = count;
        a.block = block;
        a.gate = kept_.gate + b * n + start;
        a.dgate = dgate + b * n + start;
        if (s.is_linear) {
          a.use_bias = one ? e : a.use_bias;
          a.duse_bias = one ? group + 4 * m : group;
          a.dign_bias = group + m;
          a.dw = group + 2 * m;
          a.db = group + 3 * m;
          if (linear) {
            by_betas.multiply(block + before_betas, ld, x.x, x.row, 1, count, false, betas, d);
            a.use = a.duse = block + before_betas;
            a.ign = a.dign = a.duse + m;
            a.beta_ld = ld;
          }
          for (int64_t i = 0; i < count; i += kGroup) {
            std::fill_n(group, 5 * m, T(0));
            Rows<T> some = window(a, i, std::min(kGroup, count - i));
            if (linear) {
              some.duse += i * ld;
              some.dign += i * ld;
            }
            rows(some);
            for (int64_t k = 0; k < 5 * m; ++k) {
              sum.use_bias[k] += group[k];
            }
          }
        } else {
          a.duse = wants ? to.use + at : dump;
          a.dign = wants ? to.ign + at : dump + m;
          a.dw = wants ? to.W_S + at : dump + 2 * m;
          a.db = wants ? to.B_S + at : dump + 3 * m;
          rows(a);
        }
        if (t > 0) {
          kernel.gemm({dP_sum.to(), d, block, 1, ld, x.x, x.row, m, d, count, dP_sum.adds(), false});
          dP_sum.done();
        }
        if (s.is_linear && wants) {  // of v, or of both weights
          kernel.gemm({beta_sum.to(), d, one ? block : block + before_betas, 1, ld, x.x, x.row, one ? m : 2 * m, d, count,
                       beta_sum.adds(), false});
          beta_sum.done();
        }
        if (dx != nullptr) {
          spread.multiply(dx, d, block, ld, 1, count, !fresh, stacked, d, piece.number);
          if (linear) {
            betas_to_x.multiply(dx, d, block + before_betas, ld, 1, count, true, betas, d);
          }
        }
        if (t == 0) {
          gates(piece, x, b, start, count, to, dx);
        }
        keep_dx(dx, b, start, count);
      }
    }
    beta_sum.flush();
  }

  // Where a tile's gradient of x is made, null if it is not wanted; what earlier passes have made of it is there.
  T* dx_of(const Piece& piece, int64_t b, int64_t start, int64_t count, bool fresh) const {
    const int64_t at = (b * s.n + start) * s.d;
    if (g.half_x == nullptr) {
      return g.x == nullptr ? nullptr : g.x + at;
    }
    T* tile = dx_tiles + piece.number * div.tile * s.d;
    if (!fresh) {
      widen(tile, g.half_x + at, count * s.d);
    }
    return tile;
  }
  void keep_dx(const T* dx, int64_t b, int64_t start, int64_t count) const {
    if (g.half_x != nullptr) {
      narrow(g.half_x + (b * s.n + start) * s.d, dx, count * s.d);
    }
  }
  void clear_dx(int64_t b, int64_t first, int64_t last) const {
    const int64_t at = (b * s.n + first) * s.d, count = (last - first) * s.d;
    if (g.x != nullptr) {
      std::fill_n(g.x + at, count, T(0));
    } else if (g.half_x != nullptr) {
      std::fill_n(g.half_x + at, count, uint16_t{0});
    }
  }

  // The gradients of the gates, from dgate.
  void gates(const Piece& piece, const Vectors<T>& x, int64_t b, int64_t start, int64_t count,
             const Gradients<T>& to, T* dx) const {
    const int64_t d = s.d, row = c.row();
    const bool wants = to.use != nullptr;
    const T *of = dgate + b * s.n + start, *gate = kept_.gate + b * s.n + start;
    if (!s.is_linear) {
      kernel.gate_gradients({count, d, of, gate, x.x, x.row, c.W_A + start * d, d, 1, c.scale(b),
                             wants ? to.W_A + start * d : nullptr, wants ? to.B_A + start : nullptr, dx,
                             c.lengths != nullptr || b > piece.first_sample});
      return;
    }
    double* sum = Shared(shared + piece.number * Shared::numbers(s), s).W_A;
    T* group = scratch + piece.number * scratch_ + 13 * s.m;
    for (int64_t i = 0; i < count; i += kGroup) {
      std::fill_n(group, d + 1, T(0));
      kernel.gate_gradients({std::min(kGroup, count - i), d, of + i, gate + i, x.x + i * x.row, x.row, c.W_A, row, row,
                             c.scale(b), wants ? group : nullptr, wants ? group + d : nullptr,
                             dx == nullptr ? nullptr : dx + i * d, true});
      for (int64_t k = 0; k < d + 1; ++k) {
        sum[k] += group[k];
      }
    }
  }

  // From dM and dp of a first iteration in Gram form: dv and de; dG + dG^T, and the gradient of g.
  void gram_gradients() const {
    const int64_t m = s.m, d = s.d;
    if (g.use != nullptr) {
      share(m, s.B * d * d, [&](int64_t begin, int64_t end) {
        const int64_t wide = (end - begin) * d;
        std::fill_n(dv + begin * d, wide, T(0));
        sum_samples(s.B, dv + begin * d, sums + begin * d, wide, [&](int64_t b, T* to) {
          const T *gs = kept_.g + b * (d + 1), *of = dM + (b * m + begin) * d;
          kernel.gemm({to, d, of, d, 1, kept_.G + b * d * d, d, end - begin, d, d, true, false});
          for (int64_t j = begin; j < end; ++j) {
            kernel.add_scaled(to + (j - begin) * d, dp[b * m + j], gs, d);
          }
        });
        for (int64_t j = begin; j < end; ++j) {
          double sum = 0;
          for (int64_t b = 0; b < s.B; ++b) {
            const T* gs = kept_.g + b * (d + 1);
            sum += kernel.dot(gs, dM + (b * m + j) * d, d) + gs[d] * dp[b * m + j];
          }
          dv[m * d + j] = static_cast<T>(sum);
        }
      });
    }
    share(s.B * d, 2 * m * d, [&](int64_t begin, int64_t end) {
      by_sample(begin, end, d, [&](int64_t k, int64_t count, int64_t i) {
        const T* dM_b = dM + k / d * m * d;
        kernel.gemm({sym + k * d, d, v + i, 1, d, dM_b, d, count, d, m, false, false});
        kernel.gemm({sym + k * d, d, dM_b + i, 1, d, v, d, count, d, m, true, false});
      });
    });
    for (int64_t b = 0; b < s.B; ++b) {
      T* to = dg + b * (d + 1);
      std::fill_n(to, d + 1, T(0));
      for (int64_t j = 0; j < m; ++j) {
        const T of_p = dp[b * m + j];
        kernel.add_scaled(to, e[j], dM + (b * m + j) * d, d);
        kernel.add_scaled(to, of_p, v + j * d, d);
        to[d] += of_p * e[j];
      }
    }
  }

  void gram(const Piece& piece) const {
    const int64_t n = s.n, d = s.d;
    const bool fresh = s.iterations == 1;
    T *y = blocks + piece.number * block_, *copy = copies + piece.number * c.copied(div.tile);
    for (int64_t b = piece.first_sample; b < piece.last_sample; ++b) {
      const int64_t end = piece.first_row + c.live(b, piece.first_row, piece.last_row);
      by_sym.set(sym + b * d * d, d, 1, piece.number);
      if (fresh) {
        clear_dx(b, end, piece.last_row);
      }
      for (int64_t start = piece.first_row; start < end; start += div.tile) {
        const int64_t count = std::min(div.tile, end - start);
        const Vectors<T> x = c.vectors(b, start, count, copy);
        T* dx = dx_of(piece, b, start, count, fresh);
        by_sym.multiply(y, d, x.x, x.row, 1, count, false, sym + b * d * d, d, piece.number);
        kernel.gram_rows({count, d, x.x, x.row, kept_.gate + b * n + start, y, dg + b * (d + 1), dgate + b * n + start,
                          dx, !fresh});
        gates(piece, x, b, start, count, g, dx);
        keep_dx(dx, b, start, count);
      }
    }
  }

  void clear_rows(const Gradients<T>& to, const Piece& piece) const {
    const int64_t start = piece.first_row, count = piece.last_row - start;
    for (T* one : {to.use, to.ign, to.W_S, to.B_S}) {
      std::fill_n(one + start * s.m, count * s.m, T(0));
    }
    std::fill_n(to.W_A + start * s.d, count * s.d, T(0));
    std::fill_n(to.B_A + start, count, T(0));
  }

  // What all rows share, from the pieces' sums.
  void add_shared() const {
    if (g.use == nullptr) {
      return;
    }
    const int64_t m = s.m, d = s.d, numbers = Shared::numbers(s);
    for (int64_t q = 1; q < div.pieces(); ++q) {
      for (int64_t k = 0; k < numbers; ++k) {
        shared[k] += shared[q * numbers + k];
      }
    }
    const Shared sum(shared, s);
    if (s.first() == First::kGram) {
      std::copy_n(dv, m * d, sum.v);
      std::copy_n(dv + m * d, m, sum.e);
    }
    for (int64_t j = 0; j < m; ++j) {
      const double used = c.prior[j], ignored = used - 1;
      for (int64_t k = j * d; k < (j + 1) * d; ++k) {
        g.use[k] = static_cast<T>(sum.use[k] + used * sum.v[k]);
        g.ign[k] = static_cast<T>(sum.use[m * d + k] + ignored * sum.v[k]);
      }
      g.use_bias[j] = static_cast<T>(sum.use_bias[j] + used * sum.e[j]);
      g.ign_bias[j] = static_cast<T>(sum.use_bias[m + j] + ignored * sum.e[j]);
      g.W_S[j] = static_cast<T>(sum.W_S[j]);
      g.B_S[j] = static_cast<T>(sum.W_S[m + j]);
    }
    std::copy_n(sum.W_A, d, g.W_A);
    g.B_A[0] = static_cast<T>(sum.W_A[d]);
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
    if (sample_piece > 0 && per_row_ > 0) {
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
  Operand<T> by_F2, by_G1, to_z, by_dy, by_dQ, by_stack, by_dM, by_betas, by_sym, to_x, to_x_first, betas_to_x;
  int64_t per_row_, block_, scratch_;  // numbers of a piece
  T *dy, *U, *dM, *dp, *dgate, *z, *Q, *P, *dP, *betas, *v, *e, *dv, *sym, *dg, *stack, *blocks, *copies, *dx_tiles, *scratch;
  T *row_parts, *part, *beta_part, *sums;
  double *total, *shared;
};

}  // namespace fastroute::efficient_routing

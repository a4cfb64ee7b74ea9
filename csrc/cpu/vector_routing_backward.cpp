// The backward pass of vector_routing on a CPU: everything of size n x m is made again, tile by tile.

#include "cpu/vector_routing.h"

namespace fastroute::vector_routing {
namespace {

template <class T, class X, class P>
struct Gradients {
  bool fresh, wants_rows;
  X* x;
  T* gate;
  Parameter<P> gate_weight, gate_bias, score_weight, score_bias, use, ign;  // a row per input
  // shared by all rows: sums over pieces are added to these
  T *shared_gate_weight, *shared_gate_bias, *shared_score_weight, *shared_score_bias;
  T *use_weight, *ign_weight, *use_bias, *ign_bias;
};

// A tile of a per-row gradient in the dtype of sums: the gradient itself where it is that already.
template <class T, class P>
class Stored {
 public:
  Stored(const Parameter<P>& p, int64_t tile, int64_t width, bool wanted) : p_(p), width_(width) {
    if (!std::is_same_v<T, P> || p.data == nullptr) {
      copy_ = Buffer<T>((wanted && p.data != nullptr ? tile : 1) * width, T(0));
    }
  }
  int64_t stride() const { return p_.data == nullptr ? 0 : width_; }
  T* rows(int64_t start, int64_t count, bool zero) const {
    if (p_.data == nullptr) {
      return copy_;
    }
    T* to;
    if constexpr (std::is_same_v<T, P>) {
      to = p_.data + start * width_;
    } else {
      to = copy_;
      zero = true;
    }
    if (zero) {
      std::fill_n(to, count * width_, T(0));
    }
    return to;
  }
  void store(int64_t start, int64_t count, bool fresh) const {
    if constexpr (!std::is_same_v<T, P>) {
      P* to = p_.data + start * width_;
      for (int64_t k = 0; p_.data != nullptr && k < count * width_; ++k) {
        to[k] = static_cast<P>(fresh ? copy_[k] : static_cast<T>(to[k]) + copy_[k]);
      }
    }
  }

 private:
  Parameter<P> p_;
  int64_t width_;
  Buffer<T> copy_;
};

template <class T, class X, class P>
void backward(const Problem<T, X, P>& q, const T* gate, const T* dM, const T* dp, T* dpred, const Gradients<T, X, P>& g) {
  const int64_t B = q.B, n = q.n, m = q.m, d = q.d;
  const int64_t betas = q.linear ? 1 + q.has_ign : 0;
  const int64_t groups = 1 + !q.first + betas;  // columns of a block, rows of the operand
  const int64_t reduced = groups - 1;           // of these, summed over rows: dP, and the betas' weights
  const Division div(B, n, m, d, groups, sizeof(T));
  const Buffer<T> stack = operand(q, dM, groups);
  // Sums of a piece: reduced products per sample; then shared rows.
  const int64_t products = B * reduced * m * d;
  const bool shared_gate = q.makes_gates && q.gate_weight.stride == 0;
  const int64_t shared = 4 * m + (shared_gate ? d + 1 : 0);
  const bool wants_products = reduced > 0 && (!q.first || g.wants_rows);
  Buffer<T> product_parts(wants_products ? div.pieces * products : 1);
  const Buffer<double> shared_parts(div.pieces * shared, 0.0);
  const Buffer<T> zeros(m, T(0));
  const bool shared_scores = !q.first && q.score_weight.stride == 0;

  parallel_pieces(div.pieces, [&](int64_t s) {
    const int64_t ld = groups * m, piece_stop = std::min((s + 1) * div.rows, n);
    Product<T> make_block, make_sums, make_dx;
    Buffer<T> scratch(3 * m), dump(2 * m, T(0));
    Buffer<T> x_copy = std::is_same_v<T, X> ? Buffer<T>() : Buffer<T>(div.tile * d);
    const Loaded<T, P> gate_weight(q.gate_weight, div.tile, d);
    const Loaded<T, P> w(q.score_weight, div.tile, m), bias(q.score_bias, div.tile, m);
    const Loaded<T, P> use(q.use, div.tile, m), ign(q.ign, div.tile, m);
    const Stored<T, P> dgate_weight(g.gate_weight, div.tile, d, g.wants_rows);
    const Stored<T, P> dgate_bias(g.gate_bias, div.tile, 1, g.wants_rows);
    const Stored<T, P> dw(g.score_weight, div.tile, m, g.wants_rows), db(g.score_bias, div.tile, m, g.wants_rows);
    const Stored<T, P> duse(g.use, div.tile, m, g.wants_rows), dign(g.ign, div.tile, m, g.wants_rows);
    double* shared_piece = shared_parts + s * shared;
    const Buffer<T> group(shared, T(0));
    std::vector<Accumulated<T>> sums;
    for (int64_t b = 0; b < B && wants_products; ++b) {
      sums.emplace_back(product_parts + s * products + b * reduced * m * d, reduced * m * d);
    }
    for (int64_t start = s * div.rows; start < piece_stop; start += div.tile) {
      const int64_t stop = std::min(start + div.tile, piece_stop), all = stop - start;
      // Without padding the first sample writes the tile's parameter gradients; with it, some rows may have no writer.
      const bool first_writes = std::is_same_v<T, P> && g.fresh && q.lengths == nullptr;
      const bool zero = g.fresh && !first_writes;
      const T* gate_weight_rows = gate_weight.rows(start, all);
      T* dgate_weight_rows = g.wants_rows ? dgate_weight.rows(start, all, true) : nullptr;
      T* dgate_bias_rows = dgate_bias.rows(start, all, true);
      Rows<T> a{};
      a.m = m;
      a.ld = ld;
      a.phi_ld = ld;
      a.w = w.rows(start, all);
      a.b = bias.rows(start, all);
      a.score_stride = q.score_weight.stride;
      a.use = use.rows(start, all);
      a.beta_stride = q.linear ? ld : m;
      a.ign = q.has_ign && !q.linear ? ign.rows(start, all) : static_cast<const T*>(zeros);
      a.ign_stride = !q.has_ign ? 0 : a.beta_stride;
      a.prior = q.prior;
      a.mask_row = q.mask_row;
      a.mask_col = q.mask_col;
      a.scratch = scratch;
      a.add_dgate = !g.fresh;
      a.duse = duse.rows(start, all, zero);
      a.dbeta_stride = q.linear ? ld : duse.stride();
      a.dign = q.has_ign && !q.linear ? dign.rows(start, all, zero) : static_cast<T*>(dump);
      a.dign_stride = !q.has_ign ? 0 : q.linear ? ld : dign.stride();
      a.duse_bias = group;
      a.dign_bias = group + m;
      a.dw = shared_scores ? group + 2 * m : dw.rows(start, all, zero);
      a.db = shared_scores ? group + 3 * m : db.rows(start, all, zero);
      a.dscore_stride = shared_scores ? 0 : dw.stride();
      if (q.first && g.fresh && !q.linear) {  // a single iteration: the scores' gradients are zero
        dw.rows(start, all, true);
        db.rows(start, all, true);
      }
      for (int64_t b = 0; b < B; ++b) {
        const int64_t count = q.live(b, start, stop);
        T* df = g.gate + b * n + start;
        X* dx_rows = g.x == nullptr ? nullptr : g.x + (b * n + start) * d;
        if (g.fresh) {
          std::fill(df + count, df + all, T(0));
          if (dx_rows != nullptr) {
            std::fill(dx_rows + count * d, dx_rows + all * d, X(0.0f));
          }
        }
        if (count == 0) {
          continue;
        }
        int64_t x_stride;
        const T* x = load_x<T>(q.x + b * q.x_batch + start * q.x_row, q.x_row, count, d, x_copy, &x_stride);
        const Matrix<const T> x_rows(x, count, d, x_stride);
        const Matrix<const T> operand_rows(stack + b * groups * m * d, groups * m, d, d);
        T* block = make_block(x_rows, operand_rows.transposed());
        a.phi = block;
        a.L = block + m;
        if (q.linear) {
          T* use_block = block + (1 + !q.first) * m;
          add_biases(q, use_block, use_block + m, count, ld);
          a.use = a.duse = use_block;
          if (q.has_ign) {
            a.ign = a.dign = use_block + m;
          }
        }
        a.gate = gate + b * n + start;
        a.mask = q.mask == nullptr ? nullptr : q.mask + b * q.mask_batch + start * q.mask_row;
        a.dp = dp + b * m;
        a.dgate = df;
        const int sink = q.linear ? 2 : (first_writes && b == 0) || !g.wants_rows ? 0 : 1;
        const int64_t step = q.linear ? kGroup : count;
        for (int64_t i = 0; i < count; i += step) {
          rows<T>().backward[q.first][q.mask != nullptr][sink](window(a, i, std::min(step, count - i)));
          drain<T>(shared_piece, group, 4 * m);
        }
        if (wants_products) {
          sums[b].add(make_sums(Matrix<T>(block + m, count, reduced * m, ld).transposed(), x_rows));
        }
        T* dx = dx_rows == nullptr ? nullptr : make_dx(Matrix<T>(block, count, ld, ld), operand_rows);
        if (q.makes_gates) {
          const int64_t step = shared_gate ? kGroup : count;
          for (int64_t i = 0; i < count; i += step) {
            rows<T>().gate_gradients(
                df + i, a.gate + i, x + i * x_stride, x_stride, gate_weight_rows + i * q.gate_weight.stride,
                q.gate_weight.stride, q.scale[b],
                !g.wants_rows ? nullptr : shared_gate ? group + 4 * m : dgate_weight_rows, shared_gate ? 0 : d,
                shared_gate ? group + 4 * m + d : dgate_bias_rows, shared_gate ? 0 : 1,
                dx == nullptr ? nullptr : dx + i * d, d, std::min(step, count - i), d);
            if (shared_gate) {
              drain<T>(shared_piece + 4 * m, group + 4 * m, d + 1);
            }
          }
        }
        if (dx != nullptr) {
          if constexpr (!std::is_same_v<T, X>) {
            for (int64_t k = 0; k < count * d; ++k) {
              dx_rows[k] = static_cast<X>(g.fresh ? dx[k] : static_cast<T>(dx_rows[k]) + dx[k]);
            }
          } else if (g.fresh) {
            std::copy_n(dx, count * d, dx_rows);
          } else {
            rows<T>().add_to(dx_rows, dx, count * d);
          }
        }
      }
      dgate_weight.store(start, all, true);
      dgate_bias.store(start, all, true);
      dw.store(start, all, g.fresh);
      db.store(start, all, g.fresh);
      duse.store(start, all, g.fresh);
      dign.store(start, all, g.fresh);
    }
    for (auto& sum : sums) {
      sum.finish();
    }
  });

  if (wants_products) {
    const Buffer<T> total(products);
    sum_pieces<T>(total, product_parts, div.pieces, products);
    const int64_t block = m * d;
    for (int64_t b = 0; b < B; ++b) {
      const T* from = total + b * reduced * block;
      if (!q.first) {
        std::copy_n(from, block, dpred + b * block);
        from += block;
      }
      for (T* to : {g.use_weight, g.ign_weight}) {
        if (to != nullptr) {
          if (g.fresh && b == 0) {
            std::copy_n(from, block, to);
          } else {
            rows<T>().add_to(to, from, block);
          }
        }
        from += block;
      }
    }
  }
  if (!g.wants_rows) {
    return;
  }
  const Buffer<T> total(shared);
  sum_totals<T>(total, shared_parts, div.pieces, shared);
  T* shared_rows[] = {g.use_bias, g.ign_bias, g.shared_score_weight, g.shared_score_bias};
  for (int k = 0; k < 4; ++k) {
    if (shared_rows[k] != nullptr) {
      if (g.fresh) {
        std::copy_n(total + k * m, m, shared_rows[k]);
      } else {
        rows<T>().add_to(shared_rows[k], total + k * m, m);
      }
    }
  }
  if (g.shared_gate_weight != nullptr) {
    std::copy_n(total + 4 * m, d, g.shared_gate_weight);
    *g.shared_gate_bias = total[4 * m + d];
  }
}

Tensor backward_op(
    Tensor x, Tensor gate, OptionalTensor gate_weight, OptionalTensor gate_bias, OptionalTensor scale,
    OptionalTensor pred, OptionalTensor score_weight, OptionalTensor score_bias, Tensor use, OptionalTensor ign,
    OptionalTensor use_bias, OptionalTensor ign_bias, OptionalTensor prior, OptionalTensor mask, OptionalTensor lengths,
    Tensor dM, Tensor dp, bool fresh, Tensor dgate, OptionalTensor dx, OptionalTensor dgate_weight,
    OptionalTensor dgate_bias, OptionalTensor dscore_weight, OptionalTensor dscore_bias, OptionalTensor duse,
    OptionalTensor dign, OptionalTensor duse_bias, OptionalTensor dign_bias) {
  const OptionalTensor optional_gate(gate);
  const Inputs in{x, optional_gate, gate_weight, gate_bias, scale, pred, score_weight, score_bias, use, ign, use_bias,
                  ign_bias, prior, mask, lengths};
  Tensor dpred;
  with_types(x.scalar_type(), parameter_type(in), [&](auto t, auto x_type, auto p_type) {
    using T = decltype(t);
    using X = decltype(x_type);
    using P = decltype(p_type);
    const Problem<T, X, P> q(in);
    dpred = torch::stable::new_empty(x, {q.first ? 0 : q.B, q.m, q.d}, scalar_type_of<T>());
    Gradients<T, X, P> g{};
    g.fresh = fresh;
    g.wants_rows = duse.has_value();
    g.x = pointer<X>(dx);
    g.gate = static_cast<T*>(dgate.data_ptr());
    if (q.linear) {
      g.shared_gate_weight = pointer<T>(dgate_weight);
      g.shared_gate_bias = pointer<T>(dgate_bias);
      g.shared_score_weight = pointer<T>(dscore_weight);
      g.shared_score_bias = pointer<T>(dscore_bias);
      g.use_weight = pointer<T>(duse);
      g.ign_weight = pointer<T>(dign);
      g.use_bias = pointer<T>(duse_bias);
      g.ign_bias = pointer<T>(dign_bias);
    } else {
      g.gate_weight = {pointer<P>(dgate_weight), q.d};
      g.gate_bias = {pointer<P>(dgate_bias), 1};
      g.score_weight = {pointer<P>(dscore_weight), q.m};
      g.score_bias = {pointer<P>(dscore_bias), q.m};
      g.use = {pointer<P>(duse), q.m};
      g.ign = {pointer<P>(dign), q.m};
    }
    backward(q, static_cast<const T*>(gate.data_ptr()), static_cast<const T*>(dM.data_ptr()),
             static_cast<const T*>(dp.data_ptr()), static_cast<T*>(dpred.data_ptr()), g);
  });
  return dpred;
}

}  // namespace
}  // namespace fastroute::vector_routing

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_vector_routing_native_backward", TORCH_BOX(&fastroute::vector_routing::backward_op));
}

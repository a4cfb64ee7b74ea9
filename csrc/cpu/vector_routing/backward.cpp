// The backward pass of vector_routing on a CPU: everything of size n x m is made again, tile by tile.

#include "cpu/vector_routing/vector_routing.h"

namespace fastroute::vector_routing {
namespace {

// Gradients with a row per input, [n, m] or [n, d] each.
template <class P>
struct PerRow {
  Parameter<P> gate_weight, gate_bias, score_weight, score_bias, use, ign;

  template <class F>
  void each(const F& f) {
    for (Parameter<P>* p : {&gate_weight, &gate_bias, &score_weight, &score_bias, &use, &ign}) {
      f(*p);
    }
  }
};

template <class T, class X, class P>
struct Gradients {
  bool fresh, wants_rows;
  X* x;
  T* gate;
  PerRow<P> own;
  // shared by all rows: sums over pieces are added to these
  T *shared_gate_weight, *shared_gate_bias, *shared_score_weight, *shared_score_bias;
  T *use_weight, *ign_weight, *use_bias, *ign_bias;
};

// Fill a buffer, or add to it.
template <class X, class T>
void put(X* to, const T* from, int64_t count, bool fresh) {
  if constexpr (!std::is_same_v<T, X>) {
    for (int64_t k = 0; k < count; ++k) {
      to[k] = static_cast<X>(fresh ? from[k] : static_cast<T>(to[k]) + from[k]);
    }
  } else if (fresh) {
    std::copy_n(from, count, to);
  } else {
    rows<T>().add_to(to, from, count);
  }
}

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
      if (p_.data != nullptr) {
        put<P, T>(p_.data + start * width_, copy_, count * width_, fresh);
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
  const int64_t reduced = !q.first + (g.wants_rows ? betas : 0);  // of these, summed over rows: dP, and the betas' weights
  PerRow<P> own = g.own;
  if (!q.makes_gates) {
    own.gate_weight = own.gate_bias = {};
  }
  if (q.first && !g.fresh) {
    own.score_weight = own.score_bias = {};
  }
  int64_t per_row = 0;
  own.each([&](const Parameter<P>& p) { per_row += p.data == nullptr ? 0 : p.stride; });
  const bool same = std::is_same_v<T, P>;
  const Division div(B, n, m, d, groups, same || per_row == 0 ? per_row : int64_t{1} << 32, q.lengths != nullptr,
                     sizeof(T));
  const Operand<T> operand(q, dM, groups);
  const bool shared_gate = q.makes_gates && q.gate_weight.stride == 0, shared_scores = !q.first && q.score_weight.stride == 0;
  const int64_t shared = 4 * m + (shared_gate ? d + 1 : 0), weights = g.wants_rows ? betas * m * d : 0;
  const Buffer<T> dpred_parts = !q.first && div.row_pieces > 1 ? Buffer<T>(div.row_pieces * B * m * d) : Buffer<T>();
  const Buffer<T> weight_parts(div.pieces() * weights);
  const Buffer<double> shared_parts(div.pieces() * shared, 0.0);
  const Buffer<T> row_parts((div.sample_pieces - 1) * n * per_row);

  parallel_pieces(div.pieces(), [&](int64_t s) {
    const int64_t r = s % div.row_pieces, c = s / div.row_pieces;
    const int64_t first_sample = c * div.samples, last_sample = std::min(first_sample + div.samples, B);
    const int64_t ld = groups * m, piece_stop = std::min((r + 1) * div.rows, n);
    const bool fresh = g.fresh || c > 0;  // nothing yet in this piece's per-row gradients
    PerRow<P> to = own;  // of this piece: samples past the first piece's have sums apart, added up at the end
    if constexpr (std::is_same_v<T, P>) {
      if (c > 0) {
        T* next = row_parts + (c - 1) * n * per_row;
        to.each([&](Parameter<P>& p) {
          if (p.data != nullptr) {
            p.data = next;
            next += n * p.stride;
          }
        });
      }
    }
    const bool is_alone = div.pieces() == 1;
    Product<T> make_block(is_alone), make_sums(is_alone), make_dx(is_alone);
    Buffer<T> dump(2 * m, T(0));
    Buffer<T> x_copy = std::is_same_v<T, X> ? Buffer<T>() : Buffer<T>(div.group * div.tile * d);
    const Loaded<T, P> gate_weight(q.gate_weight, div.tile, d);
    const TileRows<T, P> tile_rows(q, div.tile);
    const Stored<T, P> dgate_weight(to.gate_weight, div.tile, d, g.wants_rows);
    const Stored<T, P> dgate_bias(to.gate_bias, div.tile, 1, g.wants_rows);
    const Stored<T, P> dw(to.score_weight, div.tile, m, g.wants_rows), db(to.score_bias, div.tile, m, g.wants_rows);
    const Stored<T, P> duse(to.use, div.tile, m, g.wants_rows), dign(to.ign, div.tile, m, g.wants_rows);
    double* shared_piece = shared_parts + s * shared;
    const Buffer<T> group(shared, T(0));
    Accumulated<T> dpred_sums(div.row_pieces > 1 ? dpred_parts + r * B * m * d : dpred, q.first ? 0 : B, m * d);
    Accumulated<T> weight_sums(weight_parts + s * weights, 1, weights);
    for (int64_t start = r * div.rows; start < piece_stop; start += div.tile) {
      const int64_t stop = std::min(start + div.tile, piece_stop), all = stop - start;
      // Without padding the first sample writes the tile's parameter gradients; with it, some rows may have no writer.
      const bool first_writes = std::is_same_v<T, P> && fresh && q.lengths == nullptr;
      const bool zero = fresh && !first_writes, zero_scores = zero || (fresh && q.linear);
      const T* gate_weight_rows = gate_weight.rows(start, all);
      T* dgate_weight_rows = g.wants_rows ? dgate_weight.rows(start, all, true) : nullptr;
      T* dgate_bias_rows = dgate_bias.rows(start, all, true);
      Rows<T> a = tile_rows(q, start, all, ld);
      a.add_dgate = !g.fresh;
      a.duse = duse.rows(start, all, zero);
      a.dbeta_stride = q.linear ? ld : duse.stride();
      a.dign = q.has_ign && !q.linear ? dign.rows(start, all, zero) : static_cast<T*>(dump);
      a.dign_stride = !q.has_ign ? 0 : q.linear ? ld : dign.stride();
      a.duse_bias = group;
      a.dign_bias = group + m;
      a.dw = shared_scores ? group + 2 * m : dw.rows(start, all, zero_scores);
      a.db = shared_scores ? group + 3 * m : db.rows(start, all, zero_scores);
      a.dscore_stride = shared_scores ? 0 : dw.stride();
      if (q.first && fresh && !q.linear) {  // a single iteration: the scores' gradients are zero
        dw.rows(start, all, true);
        db.rows(start, all, true);
      }
      for (int64_t b0 = first_sample; b0 < last_sample; b0 += div.group) {
        const int64_t samples = std::min(div.group, last_sample - b0);
        const int64_t count = q.live(b0, start, stop);  // all rows, unless the group is one sample
        X* dx_rows = g.x == nullptr ? nullptr : g.x + (b0 * n + start) * d;
        if (g.fresh && count < all) {
          std::fill_n(g.gate + b0 * n + start + count, all - count, T(0));
          if (dx_rows != nullptr) {
            std::fill_n(dx_rows + count * d, (all - count) * d, X(0.0f));
          }
        }
        if (count == 0) {
          continue;
        }
        const Matrix<const T> x = load_x(q, b0, samples, start, count, static_cast<T*>(x_copy));
        T* block = make_block(x, operand.by_column(b0, samples));
        if (q.linear) {
          T* betas_from = block + !q.first * m;
          add_biases(q, betas_from, betas_from + m, samples * count, ld);
        }
        for (int64_t k = 0; k < samples; ++k) {
          const int64_t b = b0 + k;
          a.L = block + k * count * ld;
          a.phi = a.L + (groups - 1) * m;
          if (q.linear) {
            a.use = a.duse = a.L + !q.first * m;
            if (q.has_ign) {
              a.ign = a.dign = a.duse + m;
            }
          }
          a.gate = gate + b * n + start;
          a.mask = q.mask == nullptr ? nullptr : q.mask + b * q.mask_batch + start * q.mask_row;
          a.dp = dp + b * m;
          a.dgate = g.gate + b * n + start;
          const int sink = q.linear ? 2 : (first_writes && b == first_sample) || !g.wants_rows ? 0 : 1;
          const int64_t step = q.linear || shared_scores ? kGroup : count;
          for (int64_t i = 0; i < count; i += step) {
            rows<T>().backward[q.first][q.mask != nullptr][sink](window(a, i, std::min(step, count - i)));
            if (q.linear || shared_scores) {
              drain<T>(shared_piece, group, 4 * m);
            }
          }
        }
        const Matrix<T> blocks = Matrix<T>(block, count, ld, ld).batched(samples, count * ld);
        if (reduced > 0) {
          const Matrix<T> columns = Matrix<T>(block, count, reduced * m, ld).batched(samples, count * ld);
          const T* sums = make_sums(columns.transposed(), x);
          for (int64_t k = 0; k < samples; ++k, sums += reduced * m * d) {
            if (!q.first) {
              dpred_sums.add(b0 + k, 1, sums);
            }
            if (weights > 0) {
              weight_sums.add(0, 1, sums + (q.first ? 0 : m * d));
            }
          }
        }
        T* dx = dx_rows == nullptr ? nullptr : make_dx(blocks, operand.by_row(b0, samples));
        for (int64_t k = 0; k < samples; ++k) {
          const int64_t b = b0 + k, at = b * n + start;
          T* dx_sample = dx == nullptr ? nullptr : dx + k * count * d;
          const int64_t step = shared_gate ? kGroup : count;
          for (int64_t i = 0; q.makes_gates && i < count; i += step) {
            rows<T>().gate_gradients(
                g.gate + at + i, gate + at + i, x.data + k * x.batch_stride + i * x.row_stride, x.row_stride,
                gate_weight_rows + i * q.gate_weight.stride, q.gate_weight.stride, q.scale[b],
                !g.wants_rows ? nullptr : shared_gate ? group + 4 * m : dgate_weight_rows, shared_gate ? 0 : d,
                shared_gate ? group + 4 * m + d : dgate_bias_rows, shared_gate ? 0 : 1,
                dx == nullptr ? nullptr : dx_sample + i * d, d, std::min(step, count - i), d);
            if (shared_gate) {
              drain<T>(shared_piece + 4 * m, group + 4 * m, d + 1);
            }
          }
          if (dx != nullptr) {
            put(dx_rows + k * n * d, dx_sample, count * d, g.fresh);
          }
        }
      }
      dgate_weight.store(start, all, true);
      dgate_bias.store(start, all, true);
      dw.store(start, all, fresh);
      db.store(start, all, fresh);
      duse.store(start, all, fresh);
      dign.store(start, all, fresh);
    }
    if (!q.first) {
      dpred_sums.finish(first_sample, last_sample);
    }
    weight_sums.finish(0, 1);
  });

  if (!q.first && div.row_pieces > 1) {
    sum_pieces<T>(dpred, dpred_parts, div.row_pieces, B * m * d);
  }
  if (!g.wants_rows) {
    return;
  }
  if constexpr (std::is_same_v<T, P>) {
    const T* next = row_parts;
    for (int64_t c = 1; c < div.sample_pieces; ++c) {
      own.each([&](const Parameter<P>& p) {
        if (p.data != nullptr) {
          rows<T>().add_to(p.data, next, n * p.stride);
        }
        next += p.data == nullptr ? 0 : n * p.stride;
      });
    }
  }
  const Buffer<T> weight_total(weights), total(shared);
  sum_pieces<T>(weight_total, weight_parts, div.pieces(), weights);
  sum_totals<T>(total, shared_parts, div.pieces(), shared);
  const T* from = weight_total;
  for (T* to : {g.use_weight, g.ign_weight}) {
    if (to != nullptr && weights > 0) {
      put(to, from, m * d, g.fresh);
      from += m * d;
    }
  }
  from = total;
  for (T* to : {g.use_bias, g.ign_bias, g.shared_score_weight, g.shared_score_bias}) {
    if (to != nullptr) {
      put(to, from, m, g.fresh);
    }
    from += m;
  }
  if (shared_gate && g.shared_gate_weight != nullptr) {
    std::copy_n(total + 4 * m, d, g.shared_gate_weight);
    *g.shared_gate_bias = total[4 * m + d];
  }
}

struct ParameterGradients {
  const OptionalTensor &gate_weight, &gate_bias, &score_weight, &score_bias, &use, &ign, &use_bias, &ign_bias;
};

// None of them, or those of every parameter there is; rows for all inputs in the dtype of sums. A first iteration may have
// scores' gradients without scores: they are zero.
void check_gradients(const Check& check, const Inputs& in, const Fitting& s, const ParameterGradients& g) {
  const bool wanted = g.use.has_value();
  check.that(g.gate_weight.has_value() == (wanted && in.gate_weight.has_value()) &&
                 g.gate_bias.has_value() == g.gate_weight.has_value() &&
                 g.ign.has_value() == (wanted && in.ign.has_value()) &&
                 g.use_bias.has_value() == (wanted && s.linear) &&
                 g.ign_bias.has_value() == (wanted && in.ign_bias.has_value()) &&
                 g.score_bias.has_value() == g.score_weight.has_value() && (wanted || !g.score_weight.has_value()),
             "duse: expected with the gradients of all parameters, or none of them");
  check.that(!wanted || in.pred.has_value() <= g.score_weight.has_value(), "dscore_weight: expected with duse");
  if (g.gate_weight.has_value()) {
    const bool one = in.one_row(in.gate_weight);
    check.tensor("dgate_weight", g.gate_weight, one ? s.sums : s.parameters, {one ? 1 : s.n, s.d});
    check.tensor("dgate_bias", g.gate_bias, one ? s.sums : s.parameters, {one ? 1 : s.n});
  }
  if (g.score_weight.has_value()) {
    check.axes("dscore_weight", *g.score_weight, 2);
    const bool one = in.one_row(g.score_weight);
    check.that(!in.pred.has_value() || one == in.one_row(in.score_weight), "dscore_weight: expected the rows of scores");
    check.tensor("dscore_weight", g.score_weight, one ? s.sums : s.parameters, {one ? 1 : s.n, s.m});
    check.tensor("dscore_bias", g.score_bias, one ? s.sums : s.parameters, {one ? 1 : s.n, s.m});
  }
  const int64_t rows = s.linear ? s.m : s.n, width = s.linear ? s.d : s.m;
  check.tensor("duse", g.use, s.linear ? s.sums : s.parameters, {rows, width});
  check.tensor("dign", g.ign, s.linear ? s.sums : s.parameters, {rows, width});
  check.tensor("duse_bias", g.use_bias, s.sums, {s.m});
  check.tensor("dign_bias", g.ign_bias, s.sums, {s.m});
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
  const Check check("vector_routing");
  const Fitting s(check, in);
  check.tensor("dM", dM, s.sums, {s.B, s.m, s.d});
  check.tensor("dp", dp, s.sums, {s.B, s.m});
  check.tensor("dgate", dgate, s.sums, {s.B, s.n});
  check.tensor("dx", dx, x.scalar_type(), {s.B, s.n, s.d});
  check_gradients(check, in, s, {dgate_weight, dgate_bias, dscore_weight, dscore_bias, duse, dign, duse_bias, dign_bias});
  check.apart({&dgate, if_given(dx), if_given(dgate_weight), if_given(dgate_bias), if_given(dscore_weight),
               if_given(dscore_bias), if_given(duse), if_given(dign), if_given(duse_bias), if_given(dign_bias)},
              {&x, &gate, if_given(gate_weight), if_given(gate_bias), if_given(scale), if_given(pred),
               if_given(score_weight), if_given(score_bias), &use, if_given(ign), if_given(use_bias),
               if_given(ign_bias), if_given(prior), if_given(mask), if_given(lengths), &dM, &dp});
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
    if (in.one_row(gate_weight)) {
      g.shared_gate_weight = pointer<T>(dgate_weight);
      g.shared_gate_bias = pointer<T>(dgate_bias);
    } else {
      g.own.gate_weight = {pointer<P>(dgate_weight), q.d};
      g.own.gate_bias = {pointer<P>(dgate_bias), 1};
    }
    if (in.one_row(dscore_weight)) {
      g.shared_score_weight = pointer<T>(dscore_weight);
      g.shared_score_bias = pointer<T>(dscore_bias);
    } else {
      g.own.score_weight = {pointer<P>(dscore_weight), q.m};
      g.own.score_bias = {pointer<P>(dscore_bias), q.m};
    }
    if (q.linear) {
      g.use_weight = pointer<T>(duse);
      g.ign_weight = pointer<T>(dign);
      g.use_bias = pointer<T>(duse_bias);
      g.ign_bias = pointer<T>(dign_bias);
    } else {
      g.own.use = {pointer<P>(duse), q.m};
      g.own.ign = {pointer<P>(dign), q.m};
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

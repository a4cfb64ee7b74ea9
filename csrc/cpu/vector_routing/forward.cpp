// The forward pass of vector_routing on a CPU.

#include <tuple>

#include "cpu/vector_routing/vector_routing.h"

namespace fastroute::vector_routing {
namespace {

template <class T, class X, class P>
void forward(const Problem<T, X, P>& q, T* M, T* p, T* gate) {
  const int64_t B = q.B, n = q.n, m = q.m, d = q.d;
  const int64_t betas = q.linear ? 1 + q.has_ign : 0;
  const int64_t groups = 1 + betas, products = groups - q.first;
  const Division div(B, n, m, d, groups, 0, q.lengths != nullptr, sizeof(T));
  const Operand<T> operand(q, nullptr, products);
  const Buffer<T> M_parts = div.row_pieces > 1 ? Buffer<T>(div.row_pieces * B * m * d) : Buffer<T>();
  const Buffer<double> p_parts(div.row_pieces * B * m, 0.0);

  parallel_pieces(div.pieces(), [&](int64_t s) {
    const int64_t r = s % div.row_pieces, first_sample = s / div.row_pieces * div.samples;
    const int64_t last_sample = std::min(first_sample + div.samples, B);
    const int64_t ld = products * m, piece_stop = std::min((r + 1) * div.rows, n);
    const bool is_alone = div.pieces() == 1;
    Product<T> make_block(is_alone), make_M(is_alone);
    Buffer<T> own_phi(q.first ? div.group * div.tile * m : 0), group_p(m, T(0));
    Buffer<T> x_copy = std::is_same_v<T, X> ? Buffer<T>() : Buffer<T>(div.group * div.tile * d);
    const Loaded<T, P> gate_weight(q.gate_weight, div.tile, d), gate_bias(q.gate_bias, div.tile, 1);
    const TileRows<T, P> tile_rows(q, div.tile);
    Accumulated<T> sums(div.row_pieces > 1 ? M_parts + r * B * m * d : M, B, m * d);
    for (int64_t start = r * div.rows; start < piece_stop; start += div.tile) {
      const int64_t stop = std::min(start + div.tile, piece_stop), all = stop - start;
      const T *gate_weight_rows = gate_weight.rows(start, all), *gate_bias_rows = gate_bias.rows(start, all);
      Rows<T> a = tile_rows(q, start, all, ld);
      a.phi_ld = q.first ? m : ld;
      a.p = group_p;
      for (int64_t b0 = first_sample; b0 < last_sample; b0 += div.group) {
        const int64_t samples = std::min(div.group, last_sample - b0);
        const int64_t count = q.live(b0, start, stop);  // all rows, unless the group is one sample
        if (q.makes_gates && count < all) {
          std::fill(gate + b0 * n + start + count, gate + b0 * n + stop, T(0));
        }
        if (count == 0) {
          continue;
        }
        const Matrix<const T> x = load_x(q, b0, samples, start, count, static_cast<T*>(x_copy));
        T* block = nullptr;
        if (products > 0) {
          block = make_block(x, operand.by_column(b0, samples));
        }
        T* phi = q.first ? static_cast<T*>(own_phi) : block;
        for (int64_t k = 0; k < samples; ++k) {
          const int64_t b = b0 + k;
          T* f = gate + b * n + start;
          if (q.makes_gates) {
            rows<T>().make_gates(f, x.data + k * x.batch_stride, x.row_stride, gate_weight_rows, q.gate_weight.stride,
                                 gate_bias_rows, q.gate_bias.stride, q.scale[b], count, d);
          }
          a.phi = phi + k * count * a.phi_ld;
          a.L = q.first ? nullptr : a.phi;
          if (q.linear) {
            a.use = block + k * count * ld + (q.first ? 0 : m);
            a.ign = q.has_ign ? a.use + m : a.ign;
            a.use_bias = q.use_bias;
            a.ign_bias = q.has_ign ? q.ign_bias : a.ign;
          }
          a.gate = f;
          a.mask = q.mask == nullptr ? nullptr : q.mask + b * q.mask_batch + start * q.mask_row;
          for (int64_t i = 0; i < count; i += kGroup) {
            rows<T>().forward[q.first][q.mask != nullptr](window(a, i, std::min(kGroup, count - i)));
            drain<T>(p_parts + (r * B + b) * m, group_p, m);
          }
        }
        const Matrix<T> phis = Matrix<T>(phi, count, m, a.phi_ld).batched(samples, count * a.phi_ld);
        sums.add(b0, samples, make_M(phis.transposed(), x));
      }
    }
    sums.finish(first_sample, last_sample);
  });
  if (div.row_pieces > 1) {
    sum_pieces<T>(M, M_parts, div.row_pieces, B * m * d);
  }
  sum_totals<T>(p, p_parts, div.row_pieces, B * m);
}

std::tuple<Tensor, Tensor, Tensor> forward_op(
    Tensor x, OptionalTensor gate, OptionalTensor gate_weight, OptionalTensor gate_bias, OptionalTensor scale,
    OptionalTensor pred, OptionalTensor score_weight, OptionalTensor score_bias, Tensor use, OptionalTensor ign,
    OptionalTensor use_bias, OptionalTensor ign_bias, OptionalTensor prior, OptionalTensor mask,
    OptionalTensor lengths) {
  const Inputs in{x, gate, gate_weight, gate_bias, scale, pred, score_weight, score_bias, use, ign, use_bias, ign_bias,
                  prior, mask, lengths};
  const Check check("vector_routing");
  const Fitting fitting(check, in);
  check.that(!(gate.has_value() && gate_weight.has_value()), "gate: expected one, or what makes it");
  Tensor M, p, made;
  with_types(x.scalar_type(), parameter_type(in), [&](auto t, auto x_type, auto p_type) {
    using T = decltype(t);
    const Problem<T, decltype(x_type), decltype(p_type)> q(in);
    constexpr auto type = scalar_type_of<T>();
    M = torch::stable::new_empty(x, {q.B, q.m, q.d}, type);
    p = torch::stable::new_empty(x, {q.B, q.m}, type);
    made = gate.has_value() ? *gate : torch::stable::new_empty(x, {q.B, q.n}, type);
    forward(q, static_cast<T*>(M.data_ptr()), static_cast<T*>(p.data_ptr()), static_cast<T*>(made.data_ptr()));
  });
  if (gate.has_value()) {
    made = torch::stable::new_empty(x, {0}, M.scalar_type());  // an op may not return its input
  }
  return {M, p, made};
}

}  // namespace
}  // namespace fastroute::vector_routing

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_vector_routing_native", TORCH_BOX(&fastroute::vector_routing::forward_op));
}

// matrix_routing on a CPU: one pass over tiles of inputs, whose votes are made, weighed and forgotten in cache. Row
// mathematics is in rows.inc, axes and layout in matrix_routing.h, what a tile is in tile.h.
//
// Work is divided into pieces by shape only. Pieces run in parallel, each with sums of its own in double, and the sums
// are put together in order: the same input gives the same bits on any number of threads.

#include "cpu/matrix_routing/tile.h"

#include <torch/headeronly/util/BFloat16.h>

#include <tuple>

namespace fastroute::matrix_routing {
namespace {

using BFloat16 = torch::headeronly::BFloat16;

// ------------------------------------------------------------------------------------------------ forward

template <class T, class P>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Inputs& in) {
  const Problem<T, P> q(in);
  const Sizes& s = q.s;
  const auto& f = rows<T>();
  const Division division(s, q.shared, false, sizeof(T));
  const int64_t ch = s.c * s.h, few = s.B * s.p, many = few * ch;
  Buffer<double> N0(division.row_pieces * few, 0), a(division.row_pieces * few, 0);
  Buffer<double> mean(division.row_pieces * many, 0), M2(division.row_pieces * many, 0);

  division.parallel(s, [&](int64_t, int64_t piece, int64_t begin, int64_t end, int64_t b0, int64_t b1) {
    Tile<T, P> tile(q, division.tile);
    Buffer<T> scratch(6 * s.p), a_part(s.p, T(0));
    for (int64_t i = begin; i < end; i += division.tile) {
      tile.begin(i, std::min(division.tile, end - i));
      for (int64_t b = b0; b < b1; ++b) {
        if (!tile.assign(b)) {
          continue;
        }
        for (int64_t k = 0; k < tile.live; ++k) {
          const int64_t at = tile.parameters(k) * s.p;
          f.activate(s, a_part, tile.D + k * s.p, tile.use + at, tile.ign + at, tile.opened(k), tile.gate(b, k));
        }
        f.drain(a + piece * few + b * s.p, a_part, s.p);
        const int64_t at = piece * many + b * ch * s.p;
        f.moments(s, {N0 + piece * few + b * s.p, mean + at, M2 + at}, tile.V, tile.D, tile.live, scratch);
      }
    }
  });

  for (int64_t piece = 1; piece < division.row_pieces; ++piece) {
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t j = 0; j < s.m; ++j) {
        const int64_t at = b * s.p + j;
        const double before = N0[at], more = N0[piece * few + at], after = before + more;
        const double share = more != 0 ? more / after : 0;
        N0[at] = after;
        a[at] += a[piece * few + at];
        for (int64_t x = 0; x < ch; ++x) {
          const int64_t to = (b * ch + x) * s.p + j, from = piece * many + to;
          const double step = mean[from] - mean[to];
          mean[to] += step * share;
          M2[to] += M2[from] + step * step * before * share;
        }
      }
    }
  }
  const Tensor rounded = as_tensor<T>(mean, s, true);
  for (int64_t x = 0; x < many; ++x) {
    mean[x] -= static_cast<T>(mean[x]);
  }
  return {as_tensor<T>(N0, s, false), rounded, as_tensor<T>(M2, s, true), as_tensor<T>(a, s, false),
          as_tensor<T>(mean, s, true)};
}

// ------------------------------------------------------------------------------------------------ backward

struct GradTensors {
  const Tensor &center, &g1, &g2, &k, &da;
  bool fresh;
  Tensor& dgate;
  const OptionalTensor &dmu_inp, &dW, &dbias, &duse, &dign;
};

// A tile's gradients of parameters, in the layout of the tile's parameters.
template <class T>
struct ParameterGrads {
  Buffer<T> W, bias, use, ign;
  int64_t sets;
  ParameterGrads(const Sizes& s, int64_t sets)
      : W(sets * s.weights(), T(0)), bias(sets * s.votes(), T(0)), use(sets * s.p, T(0)), ign(sets * s.p, T(0)),
        sets(sets) {}
};

// All gradients of shared parameters that a piece makes.
struct SharedGrads {
  Buffer<double> W, bias, use, ign;
  SharedGrads(const Sizes& s, int64_t pieces)
      : W(pieces * s.weights(), 0), bias(pieces * s.votes(), 0), use(pieces * s.p, 0), ign(pieces * s.p, 0) {}
};

template <class T>
void finish_shared(T* to, double* from, int64_t pieces, int64_t m, int64_t k, int64_t p, bool fresh) {
  for (int64_t piece = 1; piece < pieces; ++piece) {
    for (int64_t x = 0; x < k * p; ++x) {
      from[x] += from[piece * k * p + x];
    }
  }
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t x = 0; x < k; ++x) {
      const T made = static_cast<T>(from[x * p + j]);
      to[j * k + x] = fresh ? made : to[j * k + x] + made;
    }
  }
}

template <class T, class P>
std::tuple<Tensor, Tensor, Tensor> backward(const Inputs& in, const GradTensors& out) {
  const Problem<T, P> q(in);
  const Sizes& s = q.s;
  const auto& f = rows<T>();
  const Division division(s, q.shared, true, sizeof(T));
  const int64_t ch = s.c * s.h, dh = s.d * s.h, few = s.B * s.p, many = few * ch, cd = s.c * s.d;
  const bool fresh = out.fresh, wants = out.dW.has_value();
  const Buffer<T> center = turned<T>(out.center, s, ch), g1 = turned<T>(out.g1, s, ch), g2 = turned<T>(out.g2, s, ch);
  const Buffer<T> k_out = turned<T>(out.k, s, 1), da = turned<T>(out.da, s, 1);
  T *dgate = static_cast<T*>(out.dgate.data_ptr()), *dmu = pointer<T>(out.dmu_inp);
  const int64_t sums = q.first ? 0 : division.row_pieces;
  Buffer<double> A0(sums * few, 0), A1(sums * many, 0), A2(sums * many, 0);
  SharedGrads all(s, wants && q.shared ? division.pieces() : 0);

  division.parallel(s, [&](int64_t number, int64_t piece, int64_t begin, int64_t end, int64_t b0, int64_t b1) {
    Tile<T, P> tile(q, division.tile);
    ParameterGrads<T> made(s, !wants ? 0 : q.shared ? 1 : division.tile);
    Buffer<T> dl(division.tile * s.p), scratch(2 * s.p), rows_of(division.tile * cd);
    for (int64_t i0 = begin; i0 < end; i0 += division.tile) {
      tile.begin(i0, std::min(division.tile, end - i0));
      for (int64_t b = b0; b < b1; ++b) {
        const bool any = tile.assign(b);
        if (fresh) {  // what is not live gets zeros
          std::fill_n(dgate + b * s.n + i0, tile.count, T(0));
          if (dmu != nullptr && tile.live < tile.count) {
            std::fill_n(dmu + (b * s.n + i0) * cd, tile.count * cd, T(0));
          }
        }
        if (!any) {
          continue;
        }
        const OutGrads<T> g{center + b * s.votes(), g1 + b * s.votes(), g2 + b * s.votes(), k_out + b * s.p,
                            da + b * s.p};
        for (int64_t k = 0; k < tile.live; ++k) {
          const int64_t at = tile.parameters(k) * s.p;
          dgate[b * s.n + i0 + tile.index[k]] += f.differentiate(
              s, dl + k * s.p, tile.V + k * s.votes(), tile.R + k * s.p, tile.D + k * s.p, g, q.first, tile.use + at,
              tile.ign + at, tile.opened(k), tile.gate(b, k), wants ? made.use + at : nullptr,
              wants ? made.ign + at : nullptr);
        }
        PreviousSums to{};
        if (!q.first) {
          to = {A0 + piece * few + b * s.p, A1 + piece * many + b * s.votes(), A2 + piece * many + b * s.votes()};
        }
        f.spread(s, tile.V, tile.D, dl, g, q.previous(b), to, tile.live, scratch);
        if (q.shared && tile.live == tile.count) {
          if (dmu != nullptr) {
            f.input_gradient(s, dmu + (b * s.n + i0) * cd, tile.V, tile.W, tile.live * s.c, !fresh);
          }
        } else if (dmu != nullptr) {
          for (int64_t k = 0; k < tile.live; ++k) {
            f.input_gradient(s, dmu + (b * s.n + i0 + tile.index[k]) * cd, tile.V + k * s.votes(),
                             tile.W + tile.parameters(k) * s.weights(), s.c, !fresh);
          }
        }
        if (!wants) {
          continue;
        }
        if (q.shared) {
          f.weight_gradient(s, made.W, made.bias, tile.all_mu_inp(b), tile.V, tile.live * s.c);
          f.drain(all.W + number * s.weights(), made.W, s.weights());
          f.drain(all.bias + number * s.votes(), made.bias, s.votes());
          f.drain(all.use + number * s.p, made.use, s.p);
          f.drain(all.ign + number * s.p, made.ign, s.p);
        } else {
          for (int64_t k = 0; k < tile.live; ++k) {
            f.weight_gradient(s, made.W + tile.index[k] * s.weights(), made.bias + tile.index[k] * s.votes(),
                              tile.mu_inp(b, k), tile.V + k * s.votes(), s.c);
          }
        }
      }
      if (wants && !q.shared) {
        T *dW = pointer<T>(out.dW), *dbias = pointer<T>(out.dbias), *duse = pointer<T>(out.duse),
          *dign = pointer<T>(out.dign);
        for (int64_t i = 0; i < tile.count; ++i) {
          f.turn_back(dW + (i0 + i) * s.m * dh, made.W + i * s.weights(), s.m, dh, s.p, !fresh);
          f.turn_back(dbias + (i0 + i) * s.m * ch, made.bias + i * s.votes(), s.m, ch, s.p, !fresh);
          f.turn_back(duse + (i0 + i) * s.m, made.use + i * s.p, s.m, 1, s.p, !fresh);
          f.turn_back(dign + (i0 + i) * s.m, made.ign + i * s.p, s.m, 1, s.p, !fresh);
        }
        std::fill_n(static_cast<T*>(made.W), tile.count * s.weights(), T(0));
        std::fill_n(static_cast<T*>(made.bias), tile.count * s.votes(), T(0));
        std::fill_n(static_cast<T*>(made.use), tile.count * s.p, T(0));
        std::fill_n(static_cast<T*>(made.ign), tile.count * s.p, T(0));
      }
    }
  });

  if (wants && q.shared) {
    const int64_t pieces = division.pieces();
    finish_shared(pointer<T>(out.dW), all.W, pieces, s.m, dh, s.p, fresh);
    finish_shared(pointer<T>(out.dbias), all.bias, pieces, s.m, ch, s.p, fresh);
    finish_shared(pointer<T>(out.duse), all.use, pieces, s.m, 1, s.p, fresh);
    finish_shared(pointer<T>(out.dign), all.ign, pieces, s.m, 1, s.p, fresh);
  }
  if (q.first) {
    constexpr ScalarType type = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
    return {empty_cpu<1>({0}, type), empty_cpu<1>({0}, type), empty_cpu<1>({0}, type)};
  }
  for (int64_t piece = 1; piece < division.row_pieces; ++piece) {
    for (int64_t x = 0; x < few; ++x) {
      A0[x] += A0[piece * few + x];
    }
    for (int64_t x = 0; x < many; ++x) {
      A1[x] += A1[piece * many + x];
      A2[x] += A2[piece * many + x];
    }
  }
  return {as_tensor<T>(A0, s, false), as_tensor<T>(A1, s, true), as_tensor<T>(A2, s, true)};
}

// Calls f with (sums, parameters) as types.
template <class F>
auto with_types(const Inputs& in, const F& f) {
  if (in.mu_inp.scalar_type() == ScalarType::Double) {
    return f(double(), double());
  }
  if (in.W.scalar_type() == ScalarType::BFloat16) {
    return f(float(), BFloat16());
  }
  return f(float(), float());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_op(
    const Tensor& gate, const Tensor& mu_inp, const Tensor& W, const Tensor& bias, const Tensor& use, const Tensor& ign,
    const OptionalTensor& mask, const OptionalTensor& prior, const OptionalTensor& mu, const OptionalTensor& weight) {
  const Inputs in{gate, mu_inp, W, bias, use, ign, mask, prior, mu, weight};
  check_inputs(Check("matrix_routing"), in);
  return with_types(in, [&](auto t, auto p) { return forward<decltype(t), decltype(p)>(in); });
}

std::tuple<Tensor, Tensor, Tensor> backward_op(
    const Tensor& gate, const Tensor& mu_inp, const Tensor& W, const Tensor& bias, const Tensor& use, const Tensor& ign,
    const OptionalTensor& mask, const OptionalTensor& prior, const OptionalTensor& mu, const OptionalTensor& weight,
    const Tensor& center, const Tensor& g1, const Tensor& g2, const Tensor& k, const Tensor& da, bool fresh,
    Tensor dgate, OptionalTensor dmu_inp, OptionalTensor dW, OptionalTensor dbias, OptionalTensor duse,
    OptionalTensor dign) {
  const Inputs in{gate, mu_inp, W, bias, use, ign, mask, prior, mu, weight};
  const Check check("matrix_routing");
  check_inputs(check, in);
  const ScalarType sums = sum_type(in);
  const int64_t B = mu_inp.size(0), n = mu_inp.size(1), c = mu_inp.size(2), d = mu_inp.size(3);
  const int64_t sets = W.size(0), m = W.size(1), h = W.size(3);
  for (const Tensor* t : {&center, &g1, &g2}) {
    check.tensor("center, g1, g2", *t, sums, {B, m, c, h});
  }
  check.tensor("k", k, sums, {B, m});
  check.tensor("da", da, sums, {B, m});
  check.tensor("dgate", dgate, sums, {B, n});
  check.tensor("dmu_inp", dmu_inp, sums, {B, n, c, d});
  check.tensor("dW", dW, sums, {sets, m, d, h});
  check.tensor("dbias", dbias, sums, {sets, m, c, h});
  check.tensor("duse", duse, sums, {sets, m});
  check.tensor("dign", dign, sums, {sets, m});
  check.that(dW.has_value() == dbias.has_value() && dW.has_value() == duse.has_value() &&
                 dW.has_value() == dign.has_value(),
             "dW: expected with all gradients of parameters, or none of them");
  check.apart({&dgate, if_given(dmu_inp), if_given(dW), if_given(dbias), if_given(duse), if_given(dign)},
              {&gate, &mu_inp, &W, &bias, &use, &ign, if_given(mask), if_given(prior), if_given(mu), if_given(weight),
               &center, &g1, &g2, &k, &da});
  const GradTensors out{center, g1, g2, k, da, fresh, dgate, dmu_inp, dW, dbias, duse, dign};
  return with_types(in, [&](auto t, auto p) { return backward<decltype(t), decltype(p)>(in, out); });
}

}  // namespace
}  // namespace fastroute::matrix_routing

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_matrix_routing_native", TORCH_BOX(&fastroute::matrix_routing::forward_op));
  library.impl("_matrix_routing_native_backward", TORCH_BOX(&fastroute::matrix_routing::backward_op));
}

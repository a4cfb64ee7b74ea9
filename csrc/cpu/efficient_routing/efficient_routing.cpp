// All iterations of efficient_routing in one call a pass, everything in one dtype but
// x, which may be bfloat16 beside float32. The contract is fastroute/ops/efficient_routing/native.py; the derivation, docs/vector_routing.md.
//
// Work is divided by shape alone wherever a sum depends on how, and each number is otherwise made by one chain of
// operations: the same input gives the same bits on any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "cpu/efficient_routing/backward.h"
#include "cpu/efficient_routing/forward.h"
#include "cpu/empty.h"

namespace fastroute::efficient_routing {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using OptionalTensor = std::optional<Tensor>;

struct Arguments {
  const Tensor &x, &W_A, &B_A, &W_F1, &W_F2, &B_F2, &W_G1, &W_G2, &B_G2, &W_S, &B_S, &use, &ign;
  const OptionalTensor &use_bias, &ign_bias;
  const Tensor& prior;
  const OptionalTensor &mask, &lengths;
  int64_t n_iters;
  bool normalize;
};

// The dtype of sums, and of everything but x.
ScalarType type_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 ? ScalarType::Float : x.scalar_type();
}

Sizes checked(const Check& check, const Arguments& in) {
  const ScalarType type = type_of(in.x);
  check.tensor("x", in.x, kFloats, {kAny, kAny, kAny}, Layout::kRows);
  check.axes("W_F1", in.W_F1, 2);
  check.axes("W_F2", in.W_F2, 2);
  const int64_t B = in.x.size(0), n = in.x.size(1), d = in.x.size(2), m = in.W_F1.size(0), h = in.W_F2.size(1);
  check.that(std::min({B, n, m, d, h}) >= 1, "x, W_F1, W_F2: expected none empty");
  check.that(in.n_iters >= 1 && in.n_iters < (int64_t{1} << 20), "n_iters: expected at least 1");
  const bool is_linear = in.use_bias.has_value();
  check.that(in.ign_bias.has_value() == is_linear, "bias_use, bias_ign: expected both or neither");
  const int64_t rows = is_linear ? 1 : n, beta_rows = is_linear ? m : n, beta_columns = is_linear ? d : m;
  check.tensor("W_A", in.W_A, type, {rows, d});
  check.tensor("B_A", in.B_A, type, {rows});
  check.tensor("W_F1", in.W_F1, type, {m, d});
  check.tensor("W_F2", in.W_F2, type, {d, h});
  check.tensor("B_F2", in.B_F2, type, {m, h});
  check.tensor("W_G1", in.W_G1, type, {h, d});
  check.tensor("W_G2", in.W_G2, type, {m, d});
  check.tensor("B_G2", in.B_G2, type, {m, d});
  check.tensor("W_S", in.W_S, type, {rows, m});
  check.tensor("B_S", in.B_S, type, {rows, m});
  check.tensor("beta_use", in.use, type, {beta_rows, beta_columns});
  check.tensor("beta_ign", in.ign, type, {beta_rows, beta_columns});
  check.tensor("bias_use", in.use_bias, type, {m});
  check.tensor("bias_ign", in.ign_bias, type, {m});
  check.tensor("prior", in.prior, type, {m});
  check.tensor("mask", in.mask, ScalarType::Bool, {B, n, m}, Layout::kStrided);
  check.tensor("lengths", in.lengths, ScalarType::Long, {B}, Layout::kStrided);
  return {B, n, m, d, h, in.n_iters, is_linear, in.mask.has_value()};
}

template <class T>
Call<T> call_of(const Arguments& in, const Sizes& s) {
  const auto at = [](const Tensor& t) { return static_cast<const T*>(t.data_ptr()); };
  const auto if_there = [&](const OptionalTensor& t) { return t.has_value() ? at(*t) : nullptr; };
  const bool is_half = in.x.scalar_type() == ScalarType::BFloat16;
  Call<T> c{s, in.normalize, is_half ? nullptr : at(in.x),
            is_half ? static_cast<const uint16_t*>(in.x.data_ptr()) : nullptr, in.x.stride(0), in.x.stride(1), at(in.W_A), at(in.B_A), at(in.W_F1),
            at(in.W_F2), at(in.B_F2), at(in.W_G1), at(in.W_G2), at(in.B_G2), at(in.W_S), at(in.B_S), at(in.use),
            at(in.ign), if_there(in.use_bias), if_there(in.ign_bias), at(in.prior), nullptr, 0, 0, 0, nullptr, 0};
  if (in.mask.has_value()) {
    c.mask = static_cast<const uint8_t*>(in.mask->data_ptr());
    c.mask_batch = in.mask->stride(0);
    c.mask_row = in.mask->stride(1);
    c.mask_column = in.mask->stride(2);
  }
  if (in.lengths.has_value()) {
    c.lengths = static_cast<const int64_t*>(in.lengths->data_ptr());
    c.length_stride = in.lengths->stride(0);
  }
  return c;
}

template <class F>
void with_type(ScalarType type, const F& f) {
  type == ScalarType::Double ? f(double()) : f(float());
}

std::tuple<Tensor, Tensor> forward_op(
    const Tensor& x, const Tensor& W_A, const Tensor& B_A, const Tensor& W_F1, const Tensor& W_F2, const Tensor& B_F2,
    const Tensor& W_G1, const Tensor& W_G2, const Tensor& B_G2, const Tensor& W_S, const Tensor& B_S, const Tensor& use,
    const Tensor& ign, OptionalTensor use_bias, OptionalTensor ign_bias, const Tensor& prior, OptionalTensor mask,
    OptionalTensor lengths, int64_t n_iters, bool normalize) {
  const Arguments in{x,   W_A, B_A, W_F1,     W_F2,     B_F2,  W_G1, W_G2,    B_G2,    W_S,
                     B_S, use, ign, use_bias, ign_bias, prior, mask, lengths, n_iters, normalize};
  const Sizes s = checked(Check("efficient_routing"), in);
  const ScalarType type = type_of(x);
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
    const Tensor& ign, OptionalTensor use_bias, OptionalTensor ign_bias, const Tensor& prior, OptionalTensor mask,
    OptionalTensor lengths, int64_t n_iters, bool normalize, const Tensor& dout, const Tensor& kept,
    bool want_x, bool want_rows) {
  const Arguments in{x,   W_A, B_A, W_F1,     W_F2,     B_F2,  W_G1, W_G2,    B_G2,    W_S,
                     B_S, use, ign, use_bias, ign_bias, prior, mask, lengths, n_iters, normalize};
  const Check check("efficient_routing");
  const Sizes s = checked(check, in);
  const ScalarType type = type_of(x);
  check.tensor("dout", dout, type, {s.B, s.m, s.h});
  check.tensor("kept", kept, type, {s.kept()});
  // in the order of the arguments; [0, ...] where not wanted, [0] where not given
  const auto empty = [&](const Tensor& like, bool wanted) {
    return like.dim() == 1 ? empty_cpu<1>({wanted ? like.size(0) : 0}, type)
                           : empty_cpu<2>({wanted ? like.size(0) : 0, like.size(1)}, type);
  };
  std::vector<Tensor> made{empty_cpu<3>({want_x ? s.B : 0, s.n, s.d}, x.scalar_type())};
  for (const auto& [t, wanted] : {std::pair<const Tensor*, bool>{&W_A, want_rows}, {&B_A, want_rows}, {&W_F1, true},
                                  {&W_F2, true}, {&B_F2, true}, {&W_G1, true}, {&W_G2, true}, {&B_G2, true},
                                  {&W_S, want_rows}, {&B_S, want_rows}, {&use, want_rows}, {&ign, want_rows}}) {
    made.push_back(empty(*t, wanted));
  }
  for (const OptionalTensor* t : {&use_bias, &ign_bias}) {
    made.push_back(empty_cpu<1>({want_rows && t->has_value() ? s.m : 0}, type));
  }
  with_type(type, [&](auto t) {
    using T = decltype(t);
    const auto at = [&](size_t k, bool wanted) { return wanted ? static_cast<T*>(made[k].data_ptr()) : nullptr; };
    const Call<T> call = call_of<T>(in, s);
    const bool biases = want_rows && s.is_linear;
    const bool is_half = call.half_x != nullptr;
    const Gradients<T> g{at(0, want_x && !is_half),
                         want_x && is_half ? static_cast<uint16_t*>(made[0].data_ptr()) : nullptr, at(1, want_rows), at(2, want_rows),  at(3, true),       at(4, true),
                         at(5, true),       at(6, true),      at(7, true),       at(8, true),       at(9, want_rows),
                         at(10, want_rows), at(11, want_rows), at(12, want_rows), at(13, biases),   at(14, biases)};
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

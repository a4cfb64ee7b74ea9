// BatchNorm, mask and ReLU in one pass on a CPU. The contract is fastroute/ops/task_mask/reference.py: every channel is
// counted, and the statistics are batch_norm's. A channel is read a second time while it is still in a cache; dead
// channels are read for the statistics alone.
//
// Axes: B samples, C channels, S positions. x is dense, either [B, C, S] or, channels last, [B, S, C].

#include "cpu/task_mask/task_mask.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/empty.h"
#include "cpu/task_mask/tasks.h"

namespace fastroute::task_mask {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kChunkRows = 256;  // sums of rows are made in chunks that do not depend on the number of threads
constexpr int64_t kMaxChunks = 64;
constexpr ScalarType kStatistics = ScalarType::Double;  // for the backward pass

struct Shape {
  int64_t B, C, S = 1;
  bool by_rows;  // channels last

  explicit Shape(const Tensor& x) : B(x.size(0)), C(x.size(1)) {
    for (int64_t d = 2; d < x.dim(); ++d) {
      S *= x.size(d);
    }
    int64_t expected = C;
    by_rows = C == 1 || x.stride(1) == 1;
    for (int64_t d = x.dim(); d-- > 0;) {
      if (d != 1 && x.size(d) != 1) {
        by_rows = by_rows && x.stride(d) == expected;
        expected *= x.size(d);
      }
    }
    by_rows = by_rows && !(C == 1 && S > 1);
    STD_TORCH_CHECK(by_rows || x.is_contiguous() || x.numel() == 0, "x: expected contiguous or channels last");
  }
  int64_t count() const { return B * S; }
};

// A parameter or statistic [C] of any of the dtypes; `otherwise` where there is none.
std::vector<double> numbers(const OptionalTensor& t, int64_t C, double otherwise) {
  std::vector<double> made(C, otherwise);
  if (t.has_value()) {
    const int64_t stride = t->stride(0);
    with_type(t->scalar_type(), [&](auto number) {
      using S = decltype(number);
      const auto* from = static_cast<const S*>(t->data_ptr());
      for (int64_t c = 0; c < C; ++c) {
        if constexpr (std::is_same_v<S, uint16_t>) {
          const uint32_t bits = static_cast<uint32_t>(from[c * stride]) << 16;
          float wide;
          std::memcpy(&wide, &bits, sizeof wide);
          made[c] = wide;
        } else {
          made[c] = from[c * stride];
        }
      }
    });
  }
  return made;
}

// t [C] = values, in t's dtype.
void store(const Tensor& t, const std::vector<double>& values) {
  const int64_t stride = t.stride(0);
  with_type(t.scalar_type(), [&](auto number) {
    using S = decltype(number);
    auto* to = static_cast<S*>(t.data_ptr());
    for (size_t c = 0; c < values.size(); ++c) {
      if constexpr (std::is_same_v<S, uint16_t>) {
        const auto wide = static_cast<float>(values[c]);
        uint32_t bits;
        std::memcpy(&bits, &wide, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[static_cast<int64_t>(c) * stride] = static_cast<uint16_t>(wide != wide ? (bits >> 16) | 0x40 : rounded);
      } else {
        to[static_cast<int64_t>(c) * stride] = static_cast<S>(values[c]);
      }
    }
  });
}

template <class F>
void in_threads(int64_t units, int64_t each, const F& f) {
  if (units * each < 2 * kThreadNumbers) {
    f(0, units);
  } else {
    torch::stable::parallel_for(0, units, std::max<int64_t>(1, kThreadNumbers / std::max<int64_t>(1, each)), f);
  }
}

template <class S>
class Norm {
 public:
  using T = SumOf<S>;
  using Bits = BitsOf<S>;

  Norm(const Shape& shape, const Live& live, bool training, bool relu)
      : shape_(shape), live_(live), training_(training), relu_(relu), with_(functions<S>()), a_(shape.C), b_(shape.C),
        mean_(shape.C), k_(shape.C), q_(shape.C), rest_(shape.C) {}

  // mean and scale (1 / deviation) of each channel: made here if training, else given.
  void forward(S* y, const S* x, std::vector<double>& mean, std::vector<double>& var, std::vector<double>& scale,
               const std::vector<double>& weight, const std::vector<double>& bias, double eps) {
    const int64_t C = shape_.C;
    const auto settle = [&](int64_t c) {
      scale[c] = 1.0 / std::sqrt(var[c] + eps);
      settle_affine(c, mean[c], scale[c], weight[c], bias[c]);
    };
    if (shape_.by_rows) {
      if (training_) {
        row_moments(x, mean, var);
      }
      for (int64_t c = 0; c < C; ++c) {
        settle(c);
      }
      for_rows([&](int64_t row, int64_t rows, const Bits* mask) {
        with_.row_normalise(y + row * C, x + row * C, affine(), mask, relu_, rows, C);
      });
      return;
    }
    in_threads(C, shape_.count(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        if (training_) {
          plane_moments(x, c, mean, var);
        }
        settle(c);
        for (int64_t b = 0; b < shape_.B; ++b) {
          S* to = plane(y, b, c);
          if (is_live(b, c)) {
            with_.normalise(to, plane(x, b, c), affine(c), relu_, shape_.S);
          } else {
            std::memset(static_cast<void*>(to), 0, static_cast<size_t>(shape_.S) * sizeof(S));
          }
        }
      }
    });
  }

  // dx may be null. dw and db are the gradients of weight and bias.
  void backward(S* dx, const S* g, const S* x, const std::vector<double>& mean, const std::vector<double>& scale,
                const std::vector<double>& weight, const std::vector<double>& bias, std::vector<double>& dw,
                std::vector<double>& db) {
    const int64_t C = shape_.C;
    const double N = static_cast<double>(shape_.count());
    for (int64_t c = 0; c < C; ++c) {
      settle_affine(c, mean[c], scale[c], weight[c], bias[c]);
    }
    const auto settle = [&](int64_t c, double sum, double by) {
      by -= rest_[c] * sum;
      db[c] = sum;
      dw[c] = by * scale[c];
      const double q = by * scale[c] * scale[c] / N;
      k_[c] = static_cast<T>(training_ ? sum / N - rest_[c] * q : 0.0);
      q_[c] = static_cast<T>(training_ ? q : 0.0);
    };
    if (shape_.by_rows) {
      row_gradients(dx, g, x, settle);
      return;
    }
    in_threads(C, shape_.count(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        double sums[2] = {0.0, 0.0};
        bool any = false;
        for (int64_t b = 0; b < shape_.B; ++b) {
          if (is_live(b, c)) {
            any = true;
            with_.gradient_sums(sums, plane(g, b, c), plane(x, b, c), affine(c), relu_, shape_.S);
          }
        }
        settle(c, sums[0], sums[1]);
        for (int64_t b = 0; dx != nullptr && b < shape_.B; ++b) {
          const bool live = is_live(b, c);
          if (live || (training_ && any)) {
            with_.gradient(plane(dx, b, c), live ? plane(g, b, c) : nullptr, plane(x, b, c), affine(c), relu_, shape_.S);
          } else {
            std::memset(static_cast<void*>(plane(dx, b, c)), 0, static_cast<size_t>(shape_.S) * sizeof(S));
          }
        }
      }
    });
  }

 private:
  // The kernels take off the mean as T; what it rounds away, the bias does: of a large mean that is more than y's digits.
  void settle_affine(int64_t c, double mean, double scale, double weight, double bias) {
    mean_[c] = static_cast<T>(mean);
    rest_[c] = std::isfinite(mean_[c]) ? mean - static_cast<double>(mean_[c]) : 0.0;
    a_[c] = static_cast<T>(scale * weight);
    b_[c] = static_cast<T>(bias - rest_[c] * scale * weight);
  }
  Affine<T> affine(int64_t c) const { return {a_[c], b_[c], mean_[c], k_[c], q_[c]}; }
  Affine<const T*> affine() const { return {a_.data(), b_.data(), mean_.data(), k_.data(), q_.data()}; }
  template <class P>
  P* plane(P* from, int64_t b, int64_t c) const {
    return from + (b * shape_.C + c) * shape_.S;
  }
  bool is_live(int64_t b, int64_t c) const {
    const float* row = live_.row(b);
    return row != nullptr && row[c] != 0.0f;
  }

  // Sums about a number of the channel's own, which keeps digits where the mean is large. Where that number is not like
  // the others (10 deviations from their mean: a border, an outlier), they are made again, about the mean.
  static T shift_of(S first) {
    double wide = 0;
    if constexpr (std::is_same_v<S, uint16_t>) {
      const uint32_t bits = static_cast<uint32_t>(first) << 16;
      float v;
      std::memcpy(&v, &bits, sizeof v);
      wide = v;
    } else {
      wide = first;
    }
    return std::isfinite(wide) ? static_cast<T>(wide) : T(0);
  }
  // Whether they are finite and the shift was far from the mean.
  bool moments_of(const double first, const double second, T shift, int64_t c, std::vector<double>& mean,
                  std::vector<double>& var) const {
    const double N = static_cast<double>(shape_.count()), about = first / N;
    mean[c] = shift + about;
    var[c] = std::max(second / N - about * about, 0.0);
    if (second != second) {
      var[c] = second;
    }
    return std::isfinite(second) && std::isfinite(static_cast<T>(mean[c])) && about * about > 100.0 * var[c];
  }

  void plane_moments(const S* x, int64_t c, std::vector<double>& mean, std::vector<double>& var) const {
    T shift = shift_of(*plane(x, 0, c));
    for (int times = 0; times < 2; ++times, shift = static_cast<T>(mean[c])) {
      double sums[2] = {0.0, 0.0};
      for (int64_t b = 0; b < shape_.B; ++b) {
        with_.moments(sums, plane(x, b, c), shift, shape_.S);
      }
      if (!moments_of(sums[0], sums[1], shift, c, mean, var)) {
        return;
      }
    }
  }

  // [2, C] sums of f(sums, first row, rows) over all rows, in chunks.
  template <class F>
  std::vector<double> row_sums(const F& f) const {
    const int64_t rows = shape_.count(), C = shape_.C;
    const int64_t chunk = std::max(kChunkRows, (rows + kMaxChunks - 1) / kMaxChunks), chunks = (rows + chunk - 1) / chunk;
    std::vector<double> partial(static_cast<size_t>(chunks * 2 * C), 0.0), sums(static_cast<size_t>(2 * C), 0.0);
    in_threads(chunks, chunk * C, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        f(partial.data() + k * 2 * C, k * chunk, std::min(chunk, rows - k * chunk));
      }
    });
    for (int64_t k = 0; k < chunks; ++k) {
      for (int64_t i = 0; i < 2 * C; ++i) {
        sums[i] += partial[k * 2 * C + i];
      }
    }
    return sums;
  }

  void row_moments(const S* x, std::vector<double>& mean, std::vector<double>& var) const {
    const int64_t C = shape_.C;
    std::vector<T> shift(C);
    std::transform(x, x + C, shift.begin(), shift_of);
    for (int times = 0; times < 2; ++times) {
      const auto sums = row_sums([&](double* to, int64_t row, int64_t rows) {
        with_.row_moments(to, x + row * C, shift.data(), rows, C);
      });
      bool again = false;
      for (int64_t c = 0; c < C; ++c) {
        if (moments_of(sums[c], sums[C + c], shift[c], c, mean, var)) {
          shift[c] = static_cast<T>(mean[c]);
          again = true;
        }
      }
      if (!again) {
        return;
      }
    }
  }

  // f(first row, rows, their mask) over parts of [begin, end) that are of one sample, or have one mask.
  template <class F>
  void with_masks(int64_t begin, int64_t end, const F& f) const {
    const int64_t C = shape_.C;
    std::vector<Bits> mask(C);
    for (int64_t row = begin; row < end;) {
      const int64_t b = row / shape_.S, last = live_.is_shared() ? end : std::min(end, (b + 1) * shape_.S);
      if (const float* channels = live_.row(b)) {
        with_.mask_row(mask.data(), channels, C);
      } else {
        std::fill(mask.begin(), mask.end(), Bits(0));
      }
      f(row, last - row, mask.data());
      row = last;
    }
  }
  template <class F>
  void for_rows(const F& f) const {
    in_threads(shape_.count(), shape_.C, [&](int64_t begin, int64_t end) { with_masks(begin, end, f); });
  }

  template <class F>
  void row_gradients(S* dx, const S* g, const S* x, const F& settle) const {
    const int64_t C = shape_.C;
    const auto sums = row_sums([&](double* to, int64_t from, int64_t count) {
      with_masks(from, from + count, [&](int64_t row, int64_t rows, const Bits* mask) {
        with_.row_gradient_sums(to, g + row * C, x + row * C, affine(), mask, relu_, rows, C);
      });
    });
    for (int64_t c = 0; c < C; ++c) {
      settle(c, sums[c], sums[C + c]);
    }
    if (dx == nullptr) {
      return;
    }
    std::vector<Bits> ever(C, Bits(0)), mask(C);  // the channels that some sample keeps
    for (int64_t b = 0; b < (live_.is_shared() ? 1 : shape_.B); ++b) {
      if (const float* channels = live_.row(b)) {
        with_.mask_row(mask.data(), channels, C);
        std::transform(ever.begin(), ever.end(), mask.begin(), ever.begin(),
                       [](Bits p, Bits r) { return static_cast<Bits>(p | r); });
      }
    }
    for_rows([&](int64_t row, int64_t rows, const Bits* own) {
      with_.row_gradient(dx + row * C, g + row * C, x + row * C, affine(), own, training_ ? ever.data() : own, relu_,
                         rows, C);
    });
  }

  const Shape& shape_;
  const Live& live_;
  bool training_, relu_;
  const Functions<S>& with_;
  std::vector<T> a_, b_, mean_, k_, q_;
  std::vector<double> rest_;  // of the mean
};

void check_channels(const Check& check, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                    const OptionalTensor& weight, const OptionalTensor& bias, bool training, int64_t C) {
  check.that(running_mean.has_value() == running_var.has_value() && (training || running_mean.has_value()),
             "running_mean: expected with running_var, or neither in training");
  check.tensor("running_mean", running_mean, kFloats, {C}, Layout::kApart);
  check.tensor("running_var", running_var, kFloats, {C}, Layout::kApart);
  check.tensor("weight", weight, kFloats, {C}, Layout::kStrided);
  check.tensor("bias", bias, kFloats, {C}, Layout::kStrided);
}

ScalarType sum_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> forward_op(
    const Tensor& x, const Tensor& mapping, const OptionalTensor& tasks, int64_t task, OptionalTensor running_mean,
    OptionalTensor running_var, const OptionalTensor& weight, const OptionalTensor& bias, bool training, double momentum,
    double eps, bool relu) {
  const Check check("batch_norm_mask_relu");
  check_operands(check, x, nullptr);
  const Shape shape(x);
  const int64_t C = shape.C, N = shape.count();
  check_channels(check, running_mean, running_var, weight, bias, training, C);
  if (training) {
    check.apart({if_given(running_mean), if_given(running_var)},
                {&x, &mapping, if_given(tasks), if_given(weight), if_given(bias)});
  }
  const Live live(mapping, tasks, task, x);
  Tensor y = empty_like_cpu(x);
  Tensor mean = empty_cpu<1>({training ? C : 0}, kStatistics), scale = empty_cpu<1>({training ? C : 0}, kStatistics);
  auto means = numbers(running_mean, C, 0.0), vars = numbers(running_var, C, 1.0);
  const auto old_means = means, old_vars = vars;
  std::vector<double> scales(C, 0.0);
  if (x.numel() > 0) {
    with_type(x.scalar_type(), [&](auto number) {
      using S = decltype(number);
      Norm<S>(shape, live, training, relu)
          .forward(static_cast<S*>(y.data_ptr()), static_cast<const S*>(x.data_ptr()), means, vars, scales,
                   numbers(weight, C, 1.0), numbers(bias, C, 0.0), eps);
    });
  }
  if (training) {
    store(mean, means);
    store(scale, scales);
    if (running_mean.has_value() && running_var.has_value() && x.numel() > 0) {
      const double unbiased = static_cast<double>(N) / static_cast<double>(N - 1);
      for (int64_t c = 0; c < C; ++c) {
        means[c] = momentum * means[c] + (1 - momentum) * old_means[c];
        vars[c] = momentum * vars[c] * unbiased + (1 - momentum) * old_vars[c];
      }
      store(*running_mean, means);
      store(*running_var, vars);
    }
  }
  return {y, mean, scale};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(
    const Tensor& g, const Tensor& x, const OptionalTensor&, const Tensor& mapping, const OptionalTensor& tasks,
    int64_t task, const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& scale, bool training, double eps, bool relu,
    bool want_x) {
  const Check check("batch_norm_mask_relu");
  check_operands(check, x, &g);
  const Shape shape(x);
  const int64_t C = shape.C;
  check_channels(check, running_mean, running_var, weight, bias, training, C);
  check.tensor("mean", mean, kStatistics, {training ? C : kAny}, Layout::kStrided);
  check.tensor("scale", scale, kStatistics, {training ? C : kAny}, Layout::kStrided);
  const Live live(mapping, tasks, task, x);
  Tensor same = g;  // in the layout of x
  bool as_x = true;
  for (int64_t d = 0; d < x.dim(); ++d) {
    as_x = as_x && (x.size(d) == 1 || g.stride(d) == x.stride(d));
  }
  if (!as_x) {
    same = torch::stable::empty_like(x);
    torch::stable::copy_(same, g);
  }
  Tensor dx = want_x ? empty_like_cpu(x) : empty_cpu<1>({0}, x.scalar_type());
  const auto type_of = [&](const OptionalTensor& t) { return t.has_value() ? t->scalar_type() : sum_type(x); };
  Tensor dw = empty_cpu<1>({C}, type_of(weight)), db = empty_cpu<1>({C}, type_of(bias));
  std::vector<double> dws(C, 0.0), dbs(C, 0.0);
  if (x.numel() > 0) {
    auto means = numbers(training ? OptionalTensor(mean) : running_mean, C, 0.0);
    auto scales = numbers(training ? OptionalTensor(scale) : running_var, C, 1.0);
    with_type(x.scalar_type(), [&](auto number) {
      using S = decltype(number);
      for (int64_t c = 0; c < C && !training; ++c) {  // as the forward pass had them
        scales[c] = 1.0 / std::sqrt(scales[c] + eps);
      }
      Norm<S>(shape, live, training, relu)
          .backward(want_x ? static_cast<S*>(dx.data_ptr()) : nullptr, static_cast<const S*>(same.data_ptr()),
                    static_cast<const S*>(x.data_ptr()), means, scales, numbers(weight, C, 1.0), numbers(bias, C, 0.0),
                    dws, dbs);
    });
  }
  store(dw, dws);
  store(db, dbs);
  return {dx, dw, db};
}

}  // namespace
}  // namespace fastroute::task_mask

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_batch_norm_mask_relu_native", TORCH_BOX(&fastroute::task_mask::forward_op));
  library.impl("_batch_norm_mask_relu_native_backward", TORCH_BOX(&fastroute::task_mask::backward_op));
}

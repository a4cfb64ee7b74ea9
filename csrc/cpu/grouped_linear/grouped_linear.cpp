// grouped_linear on a CPU: one linear module per row of a plan. The contract is fastroute/ops/dispatch/reference.py.
//
// Rows stay where they are: tiles of them reach the kernels as pointers. The work is a list of units, made from the shape
// and the plan alone; each result is computed within one unit, so threads share the units in any way for the same bits.
//
// Axes: N rows, K modules, F features in, O features out.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/gemm.h"
#include "cpu/activation.h"
#include "cpu/dispatch/dispatch.h"
#include "cpu/empty.h"
#include "cpu/grouped_linear/grouped_linear.h"

namespace fastroute::grouped_linear {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kTileRows = 96;
constexpr int64_t kMostRows = 144;     // of a tile, to the nearest
constexpr int64_t kLibraryRows = 512;  // of a tile that a library multiplies
constexpr int64_t kLongest = 4096;     // of its sums

// int64 numbers anywhere; without any, the identity.
class Index {
 public:
  Index() = default;
  explicit Index(const Tensor& t) : data_(static_cast<const int64_t*>(t.data_ptr())), stride_(t.stride(0)) {}
  explicit Index(const OptionalTensor& t) : Index(t.has_value() ? Index(*t) : Index()) {}
  int64_t operator[](int64_t i) const { return data_ == nullptr ? i : data_[i * stride_]; }

 private:
  const int64_t* data_ = nullptr;
  int64_t stride_ = 1;
};

template <class S>
struct Weight {
  const S* data;
  int64_t row, col;
};

template <class S>
struct Bias {
  const S* data = nullptr;
  int64_t stride = 1;
};

// One for each module, of K tensors [O, F] or one [K, O, F].
template <class S>
std::vector<Weight<S>> weights_of(const Tensors& tensors) {
  std::vector<Weight<S>> made;
  for (const Tensor& t : tensors) {
    const auto* data = static_cast<const S*>(t.data_ptr());
    const bool is_stacked = t.dim() == 3;
    for (int64_t k = 0; k < (is_stacked ? t.size(0) : 1); ++k) {
      made.push_back({data + (is_stacked ? k * t.stride(0) : 0), t.stride(t.dim() - 2), t.stride(t.dim() - 1)});
    }
  }
  return made;
}

// One for each module, of K tensors [O] or [1, O] or one [K, O].
template <class S>
std::vector<Bias<S>> biases_of(const Tensors& tensors) {
  std::vector<Bias<S>> made;
  for (const Tensor& t : tensors) {
    const auto* data = static_cast<const S*>(t.data_ptr());
    const int64_t modules = t.dim() == 2 ? t.size(0) : 1;
    for (int64_t k = 0; k < modules; ++k) {
      made.push_back({data + (t.dim() == 2 ? k * t.stride(0) : 0), t.stride(t.dim() - 1)});
    }
  }
  return made;
}

// What a weight gives the kernels: rows or columns that are dense, copied where neither is.
template <class S>
class Dense {
 public:
  Dense(const Weight<S>& w, int64_t O, int64_t F) {
    is_by_row = w.col == 1 || F == 1;
    if (is_by_row || w.row == 1 || O == 1) {
      data = w.data;
      stride = is_by_row ? w.row : w.col;
      return;
    }
    is_by_row = true;
    stride = F;
    copy_.reset(new S[O * F]);
    for (int64_t o = 0; o < O; ++o) {
      for (int64_t f = 0; f < F; ++f) {
        copy_[o * F + f] = w.data[o * w.row + f * w.col];
      }
    }
    data = copy_.get();
  }
  const S* data;
  int64_t stride;
  bool is_by_row;

 private:
  std::unique_ptr<S[]> copy_;
};

template <class S>
class DenseBias {
 public:
  DenseBias(const Bias<S>& b, int64_t O) : data(b.data) {
    if (b.stride != 1 && O > 1) {
      copy_.reset(new S[O]);
      for (int64_t o = 0; o < O; ++o) {
        copy_[o] = b.data[o * b.stride];
      }
      data = copy_.get();
    }
  }
  const S* data;

 private:
  std::unique_ptr<S[]> copy_;
};

enum class Kind { kRows, kParameters };

struct Unit {
  Kind kind;
  int64_t module, begin, end;
  int64_t done;  // the cost of all units up to this one
};

// Units of work, and threads to share them when they are worth it. A cost is about a nanosecond.
class Units {
 public:
  void add(Kind kind, int64_t module, int64_t begin, int64_t end, int64_t cost) {
    total_ += cost;
    units_.push_back({kind, module, begin, end, total_});
  }
  template <class F>
  void run(const F& f) const {
    const int64_t pieces =
        total_ < kWorthThreads ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), total_ / (kWorthThreads / 4));
    if (pieces == 1) {
      std::for_each(units_.begin(), units_.end(), f);
      return;
    }
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      std::for_each(after(total_ * begin / pieces), after(total_ * end / pieces), f);
    });
  }

 private:
  static constexpr int64_t kWorthThreads = 300000;  // waking a thread costs as much as a tenth of this
  std::vector<Unit>::const_iterator after(int64_t cost) const {
    return std::lower_bound(units_.begin(), units_.end(), cost, [](const Unit& u, int64_t c) { return u.done <= c; });
  }
  std::vector<Unit> units_;
  int64_t total_ = 0;
};

// Tiles of the rows of every module that has some; of few rows in all a module may have more tiles, for the threads.
void add_row_tiles(
    Units& units, const Index& offsets, int64_t K, int64_t most, int64_t cost_of_module, int64_t cost_of_row) {
  const int64_t added = most == kTileRows && offsets[K] >= 8 * kTileRows ? most / 2 : most - 1;
  for (int64_t k = 0; k < K; ++k) {
    const int64_t start = offsets[k], stop = offsets[k + 1], rows = stop - start;
    const int64_t tiles = rows == 0 ? 0 : std::max<int64_t>(1, (rows + added) / most);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = start + rows * t / tiles, end = start + rows * (t + 1) / tiles;
      units.add(Kind::kRows, k, begin, end, cost_of_module + (end - begin) * cost_of_row);
    }
  }
}

template <class S>
void zero_rows(S* out, int64_t width, const Index& put, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    std::fill_n(out + put[i] * width, width, S(0));
  }
}

// Sorted rows [begin, end) of a matrix, as pointers. (To prefetch them here gained nothing: 0.95 to 1.05.)
template <class S>
class RowPointers {
 public:
  RowPointers(S* data, int64_t stride, const Index& at, int64_t begin, int64_t end) {
    if (end - begin > kMostRows) {
      many_.reset(new S*[end - begin]);
    }
    S** to = many_ ? many_.get() : few_.data();
    for (int64_t i = begin; i < end; ++i) {
      *to++ = data + at[i] * stride;
    }
  }
  S* const* get() const { return many_ ? many_.get() : few_.data(); }

 private:
  std::array<S*, kMostRows> few_;
  std::unique_ptr<S*[]> many_;
};

// Whether a library makes products of so many rows with a weight [O, F]. Of bfloat16 alone; by shape alone.
template <class S>
bool is_by_library(int64_t rows, int64_t O, int64_t F) {
  return std::is_same_v<S, uint16_t> && std::min(O, F) >= 64 && std::max(O, F) <= kLongest &&
         onednn_multiplies_bfloat16(rows, O * F);
}
template <class S>
int64_t tile_rows(int64_t O, int64_t F) {
  return is_by_library<S>(kLibraryRows, O, F) ? kLibraryRows : kTileRows;
}

// A matrix of bfloat16 in memory of somebody else's.
template <class S>
Tensor matrix(const S* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
  return torch::stable::from_blob(
      const_cast<S*>(data), {sizes.data(), 2}, {strides.data(), 2},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::BFloat16);
}

// Rows [rows, n] side by side, of columns [begin, begin + n).
template <class S>
std::unique_ptr<S[]> gathered(const S* const* from, int64_t rows, int64_t begin, int64_t n) {
  std::unique_ptr<S[]> to(new S[rows * n]);
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(from[i] + begin, n, to.get() + i * n);
  }
  return to;
}

// What multiply does, by a library.
template <class S>
void multiply_by_library(
    S* const* out, const S* const* a, int64_t rows, const Dense<S>& w, bool transposed, const S* bias, int64_t O,
    int64_t F) {
  const int64_t n = transposed ? F : O, k = transposed ? O : F;
  const auto left = gathered(a, rows, 0, k);
  const Tensor weight = transposed ? matrix(w.data, F, O, 1, F) : matrix(w.data, O, F, F, 1);
  const std::array<int64_t, 1> size{n}, stride{1};
  std::optional<Tensor> added;
  if (bias != nullptr) {
    added = torch::stable::from_blob(
        const_cast<S*>(bias), {size.data(), 1}, {stride.data(), 1},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::BFloat16);
  }
  const Tensor made = onednn_linear(matrix(left.get(), rows, k, k, 1), weight, added.has_value() ? &*added : nullptr);
  const auto* from = static_cast<const S*>(made.data_ptr());
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(from + i * n, n, out[i]);
  }
}

// out[i] = w a[i] + bias, or w^T a[i], of some of a module's rows
template <class S>
void multiply(
    const RowPointers<S>& out, const RowPointers<const S>& a, int64_t rows, int64_t rows_of_module, const Dense<S>& w,
    bool transposed, const S* bias, int64_t O, int64_t F) {
  if (is_by_library<S>(rows, O, F) && w.is_by_row && w.stride == F) {
    multiply_by_library(out.get(), a.get(), rows, w, transposed, bias, O, F);
    return;
  }
  const auto& kernel = kernels<S>();
  const int64_t n = transposed ? F : O, k = transposed ? O : F;
  const bool combines = w.is_by_row == transposed;
  if (combines ? kernel.packs(rows, n, k) : kernel.turns(std::min(rows_of_module, kTileRows), n, k)) {
    const std::unique_ptr<typename Sum<S>::type[]> scratch(
        new typename Sum<S>::type[2 * kernel.lanes * (kRun + rows)]);
    const auto run = combines ? kernel.combine_packed : kernel.dot_turned;
    run(out.get(), a.get(), rows, w.data, w.stride, bias, n, k, scratch.get());
  } else {
    const auto run = combines ? kernel.combine : kernel.dot;
    run(out.get(), a.get(), rows, w.data, w.stride, bias, n, k);
  }
}

// The cost of a module's weights, and of a row: sixteen multiply-adds a nanosecond.
template <class S>
constexpr int64_t weight_cost(int64_t O, int64_t F) {
  return 50 + O * F * static_cast<int64_t>(sizeof(S)) / 16;
}
constexpr int64_t row_cost(int64_t O, int64_t F) {
  return 4 + O * F / 16;
}

// y, and what the activation is applied to if `before` is not null
template <class S>
void forward(
    S* y, S* before, const Tensor& x, const Index& take, const Index& put, const Index& offsets, int64_t N,
    const std::vector<Weight<S>>& weights, const std::vector<Bias<S>>& biases, int64_t O, int64_t kind) {
  const int64_t K = static_cast<int64_t>(std::max(weights.size(), biases.size()));
  const int64_t F = weights.empty() ? 0 : x.size(1), x_row = x.stride(0);
  const auto* x_data = weights.empty() ? nullptr : static_cast<const S*>(x.data_ptr());
  const auto activate = activation::functions<S>().apply[kind];
  Units units;
  add_row_tiles(units, offsets, K, tile_rows<S>(O, F), weight_cost<S>(O, F), row_cost(O, F));
  units.run([&](const Unit& u) {
    const DenseBias<S> bias(biases.empty() ? Bias<S>() : biases[u.module], O);
    if (weights.empty()) {
      for (int64_t i = u.begin; i < u.end; ++i) {
        std::copy_n(bias.data, O, y + put[i] * O);
      }
      return;
    }
    const RowPointers<S> out(y, O, put, u.begin, u.end);
    const RowPointers<const S> rows(x_data, x_row, take, u.begin, u.end);
    const int64_t of_module = offsets[u.module + 1] - offsets[u.module];
    multiply(out, rows, u.end - u.begin, of_module, Dense<S>(weights[u.module], O, F), false, bias.data, O, F);
    if (kind == activation::kNone) {
      return;
    }
    for (int64_t i = u.begin; i < u.end; ++i) {
      S* row = y + put[i] * O;
      if (before != nullptr) {
        std::copy_n(row, O, before + put[i] * O);
      }
      activate(row, O);
    }
  });
  zero_rows(y, O, put, offsets[K], N);
  if (before != nullptr) {
    zero_rows(before, O, put, offsets[K], N);
  }
}

// Sorted rows of the gradient before the activation.
template <class S>
std::unique_ptr<S[]> sloped(
    const S* grad, const S* kept, const Index& put, int64_t rows, int64_t O, int64_t kind) {
  std::unique_ptr<S[]> made(new S[rows * O]);
  const auto slope = activation::functions<S>().slope[kind];
  Units units;
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t end = std::min(i + kTileRows, rows);
    units.add(Kind::kRows, 0, i, end, (end - i) * row_cost(O, kind >= activation::kSilu ? 32 : 8));
  }
  units.run([&](const Unit& u) {
    for (int64_t i = u.begin; i < u.end; ++i) {
      slope(made.get() + i * O, grad + put[i] * O, kept + put[i] * O, O);
    }
  });
  return made;
}

// The gradients' memory: null, or no list, where one is not wanted.
template <class S>
struct Gradients {
  S* dx;
  std::vector<S*> dw, db;
};

template <class S>
void backward(
    const Gradients<S>& to, const S* g, int64_t N, int64_t O, const Tensor& x, const Index& take, const Index& spread,
    const Index& put, const Index& offsets, const std::vector<Weight<S>>& weights, int64_t K) {
  const int64_t F = weights.empty() ? 0 : x.size(1);
  const auto* x_data = weights.empty() ? nullptr : static_cast<const S*>(x.data_ptr());
  const int64_t x_row = x.stride(0);
  Units units;
  if (to.dx != nullptr) {
    add_row_tiles(units, offsets, K, tile_rows<S>(O, F), weight_cost<S>(O, F), row_cost(O, F));
  }
  if (!to.dw.empty() || !to.db.empty()) {
    const int64_t width = to.dw.empty() ? 1 : F;
    const bool is_wide = kernels<S>().lanes * sizeof(typename Sum<S>::type) >= 64;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t rows = offsets[k + 1] - offsets[k];
      if ((to.dw.empty() || to.dw[k] == nullptr) && (to.db.empty() || to.db[k] == nullptr)) {
        continue;
      }
      // Columns of a part, each of which packs all of x: wide ones where modules are many. But of few rows more than 96 at a
      // time took up to 1.7 times as long with vectors of 64 bytes, on an Intel Sapphire Rapids: results lie too far apart.
      const int64_t most = is_wide && rows < 96 ? 96 : 192;
      const int64_t least = is_by_library<S>(rows, O, width) ? 256 : std::clamp<int64_t>(O * K / 4, 48, most);
      const int64_t parts = std::max<int64_t>(1, std::min(rows * O * width >> 20, (O + least - 1) / least));
      const int64_t step = (O + parts * kPanel - 1) / (parts * kPanel) * kPanel;
      for (int64_t o = 0; o < O; o += step) {
        const int64_t end = std::min(o + step, O);
        units.add(Kind::kParameters, k, o, end, weight_cost<S>(end - o, width) + rows * row_cost(end - o, width));
      }
    }
  }
  units.run([&](const Unit& u) {
    if (u.kind == Kind::kRows) {
      const RowPointers<S> out(to.dx, F, spread, u.begin, u.end);
      const RowPointers<const S> rows(g, O, put, u.begin, u.end);
      const int64_t of_module = offsets[u.module + 1] - offsets[u.module];
      multiply<S>(out, rows, u.end - u.begin, of_module, Dense<S>(weights[u.module], O, F), true, nullptr, O, F);
      return;
    }
    const int64_t start = offsets[u.module], stop = offsets[u.module + 1];
    const RowPointers<const S> grads(g, O, put, start, stop);
    if (!to.dw.empty() && to.dw[u.module] != nullptr) {
      const RowPointers<const S> rows(x_data, x_row, take, start, stop);
      const int64_t columns = u.end - u.begin, count = stop - start;
      if (is_by_library<S>(count, columns, F) && count <= kLongest) {
        const auto g_here = gathered(grads.get(), count, u.begin, columns), x_here = gathered(rows.get(), count, 0, F);
        const Tensor made = onednn_linear(
            matrix(g_here.get(), columns, count, 1, columns), matrix(x_here.get(), F, count, 1, F));
        std::copy_n(static_cast<const S*>(made.data_ptr()), columns * F, to.dw[u.module] + u.begin * F);
        if (!to.db.empty() && to.db[u.module] != nullptr) {
          kernels<S>().sum(to.db[u.module], grads.get(), count, u.begin, u.end);
        }
        return;
      }
      const std::unique_ptr<typename Sum<S>::type[]> scratch(
          new typename Sum<S>::type[kernels<S>().outer_scratch(stop - start, u.end - u.begin, F)]);
      kernels<S>().outer(
          to.dw[u.module], F, grads.get(), rows.get(), stop - start, u.begin, u.end, F, scratch.get());
    }
    if (!to.db.empty() && to.db[u.module] != nullptr) {
      kernels<S>().sum(to.db[u.module], grads.get(), stop - start, u.begin, u.end);
    }
  });
  if (to.dx != nullptr) {
    zero_rows(to.dx, F, spread, offsets[K], N);
  }
}

// Calls f with a number of the type that kernels know as `type`.
template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(uint16_t());
    default: STD_TORCH_CHECK(false, "grouped_linear: expected float32, float64 or bfloat16");
  }
}

// How many modules there are, of weights [O, F] (or one [K, O, F]) and biases of O numbers (or one [K, O]), or one of both.
int64_t check_modules(const Check& check, const Tensors& weights, const Tensors& biases, ScalarType type, int64_t O,
                      int64_t F) {
  const bool are_stacked = weights.size() == 1 && weights[0].dim() == 3;
  const auto K = are_stacked ? weights[0].size(0) : static_cast<int64_t>(weights.size());
  for (const Tensor& w : weights) {
    if (are_stacked) {
      check.tensor("weights", w, type, {K, O, F}, Layout::kStrided);
    } else {
      check.tensor("weights", w, type, {O, F}, Layout::kStrided);
    }
  }
  int64_t of_biases = 0;
  for (const Tensor& b : biases) {
    if (!weights.empty()) {
      check.axes("biases", b, are_stacked ? 2 : 1);
    }
    if (b.dim() == 1) {
      check.tensor("biases", b, type, {O}, Layout::kStrided);
      of_biases += 1;
    } else {
      check.tensor("biases", b, type, {biases.size() == 1 ? kAny : 1, O}, Layout::kStrided);
      of_biases += b.size(0);
    }
  }
  check.that(weights.empty() || biases.empty() || K == of_biases, "biases: expected ", K, ", got ", of_biases);
  return weights.empty() ? of_biases : K;
}

// N places that rows are read from, below `below`; or written to, each once.
void check_places(const Check& check, const char* name, const OptionalTensor& t, int64_t N, int64_t below) {
  check.tensor(name, t, ScalarType::Long, {N}, Layout::kStrided);
  if (t.has_value()) {
    check.in_range(name, *t, 0, below);
  }
}
void check_written(const Check& check, const char* name, const OptionalTensor& t, int64_t N) {
  check.tensor(name, t, ScalarType::Long, {N}, Layout::kStrided);
  if (t.has_value()) {
    check.permutation(name, *t);
  }
}

// The plan of N rows, and x [X, F], which they are read from where there are weights.
void check_rows(const Check& check, const Tensor& x, const OptionalTensor& take, const Tensor& offsets, bool reads_x,
                ScalarType type, int64_t N, int64_t F, int64_t modules) {
  check.that(modules >= 1 && modules < INT64_MAX, "modules: expected at least 1, got ", modules);
  if (reads_x) {
    check.tensor("x", x, type, {take.has_value() ? kAny : N, F}, Layout::kRows);
    check_places(check, "take", take, N, x.size(0));
  }
  check.tensor("offsets", offsets, ScalarType::Long, {modules + 1}, Layout::kStrided);
  check.offsets("offsets", offsets, N);
}

// (modules, O, F, dtype) of arguments that fit together.
struct Sizes {
  int64_t modules, O, F;
  ScalarType type;

  Sizes(const Check& check, const Tensors& weights, const Tensors& biases, int64_t kind, bool keep) {
    const bool has_weights = !weights.empty();
    check.that(has_weights || !biases.empty(), "weights: expected some, or biases");
    const Tensor& like = has_weights ? weights[0] : biases[0];
    O = like.size(like.dim() - (has_weights ? 2 : 1));
    F = has_weights ? like.size(like.dim() - 1) : 0;
    type = like.scalar_type();
    modules = check_modules(check, weights, biases, type, O, F);
    check.that(kind >= 0 && kind < activation::kKinds, "activation: there is none of number ", kind);
    check.that(kind == activation::kNone ? !keep : has_weights, "activation: expected one to keep for, after weights");
  }
};

std::tuple<Tensor, Tensor> made(
    const Sizes& s, const Tensor& x, const OptionalTensor& take, const OptionalTensor& put, const Tensor& offsets,
    int64_t N, const Tensors& weights, const Tensors& biases, int64_t kind, bool keep) {
  Tensor y = empty_cpu<2>({N, s.O}, s.type), before = keep ? empty_cpu<2>({N, s.O}, s.type) : empty_cpu<1>({0}, s.type);
  with_type(s.type, [&](auto number) {
    using S = decltype(number);
    forward<S>(
        static_cast<S*>(y.data_ptr()), keep ? static_cast<S*>(before.data_ptr()) : nullptr, x, Index(take), Index(put),
        Index(offsets), N, weights_of<S>(weights), biases_of<S>(biases), s.O, kind);
  });
  return {std::move(y), std::move(before)};
}

// forward_op of rows whose modules are named by actions: (y, before, the plan's order, offsets and beyond).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> planned_op(
    const Tensor& x, const Tensor& actions, const Tensors& weights, const Tensors& biases, int64_t kind, bool keep) {
  const Check check("grouped_linear");
  const Sizes s(check, weights, biases, kind, keep);
  check.that(!weights.empty() && s.modules >= 1, "weights: expected one of each module");
  auto [order, offsets, beyond] = dispatch_plan(actions, s.modules);
  const int64_t N = order.size(0);
  check.tensor("x", x, s.type, {N, s.F}, Layout::kRows);
  auto [y, before] = made(s, x, order, order, offsets, N, weights, biases, kind, keep);
  return {std::move(y), std::move(before), std::move(order), std::move(offsets), std::move(beyond)};
}

}  // namespace

std::tuple<Tensor, Tensor> forward_op(
    const Tensor& x, const OptionalTensor& take, const OptionalTensor& put, const Tensor& offsets,
    const Tensors& weights, const Tensors& biases, int64_t kind, bool keep) {
  const Check check("grouped_linear");
  const Sizes s(check, weights, biases, kind, keep);
  const int64_t N = take.has_value() ? take->size(0) : x.size(0);
  check_rows(check, x, take, offsets, !weights.empty(), s.type, N, s.F, s.modules);
  check_written(check, "put", put, N);
  return made(s, x, take, put, offsets, N, weights, biases, kind, keep);
}

std::tuple<Tensor, Tensors, Tensors> backward_op(
    const Tensor& grad, const Tensor& x, const OptionalTensor& take, const OptionalTensor& spread,
    const OptionalTensor& put, const Tensor& offsets, const Tensors& weights, int64_t modules, bool want_x,
    bool want_weights, bool want_biases, int64_t kind, const OptionalTensor& kept, bool stacked, bool keep_empty) {
  const Check check("grouped_linear");
  const bool has_weights = !weights.empty();
  const ScalarType type = grad.scalar_type();
  check.tensor("grad", grad, type, {kAny, kAny});
  const int64_t N = grad.size(0), O = grad.size(1), F = has_weights ? weights[0].size(weights[0].dim() - 1) : 0;
  const int64_t of_weights = check_modules(check, weights, {}, type, O, F);
  check.that(!has_weights || modules == of_weights, "modules: expected ", of_weights, ", got ", modules);
  check_rows(check, x, take, offsets, has_weights, type, N, F, modules);
  check_written(check, "spread", spread, N);
  check_places(check, "put", put, N, N);
  check.that(kind >= 0 && kind < activation::kKinds, "activation: there is none of number ", kind);
  check.tensor("kept", kept, type, {N, O});
  const Index starts(offsets);
  want_x = want_x && has_weights;
  want_weights = want_weights && has_weights;
  Tensor dx = want_x ? empty_cpu<2>({N, F}, type) : empty_cpu<1>({0}, type);
  Tensors dw, db;
  with_type(type, [&](auto s) {
    using S = decltype(s);
    Gradients<S> to{want_x ? static_cast<S*>(dx.data_ptr()) : nullptr, {}, {}};
    const auto add = [](Tensors& made, std::vector<S*>& data, Tensor t) {
      data.push_back(t.numel() > 0 ? static_cast<S*>(t.data_ptr()) : nullptr);
      made.push_back(std::move(t));
    };
    const auto add_stacked = [&](Tensors& made, std::vector<S*>& data, Tensor t) {
      for (int64_t k = 0; k < modules; ++k) {
        data.push_back(t.numel() > 0 ? static_cast<S*>(t.data_ptr()) + k * (t.numel() / modules) : nullptr);
      }
      made.push_back(std::move(t));
    };
    if (stacked) {
      if (want_weights) {
        add_stacked(dw, to.dw, empty_cpu<3>({modules, O, F}, type));
      }
      if (want_biases) {
        add_stacked(db, to.db, empty_cpu<2>({modules, O}, type));
      }
    }
    const Tensor nothing = empty_cpu<1>({0}, type);
    for (int64_t k = 0; k < modules && !stacked; ++k) {
      const bool is_made = keep_empty || starts[k] < starts[k + 1];
      if (want_weights) {
        add(dw, to.dw, is_made ? empty_cpu<2>({O, F}, type) : nothing);
      }
      if (want_biases) {  // without weights these are rows of tables
        add(db, to.db, !is_made ? nothing : has_weights ? empty_cpu<1>({O}, type) : empty_cpu<2>({1, O}, type));
      }
    }
    const auto* g = static_cast<const S*>(grad.data_ptr());
    const auto w = weights_of<S>(weights);
    if (kind == activation::kNone || !kept.has_value()) {
      backward<S>(to, g, N, O, x, Index(take), Index(spread), Index(put), starts, w, modules);
    } else {
      const auto before = sloped<S>(g, static_cast<const S*>(kept->data_ptr()), Index(put), starts[modules], O, kind);
      backward<S>(to, before.get(), N, O, x, Index(take), Index(spread), Index(), starts, w, modules);
    }
  });
  return {std::move(dx), std::move(dw), std::move(db)};
}

}  // namespace fastroute::grouped_linear

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  using namespace fastroute;
  library.impl("_grouped_linear_native", TORCH_BOX(&WithLists<grouped_linear::forward_op>::call));
  library.impl("_grouped_linear_native_planned", TORCH_BOX(&WithLists<grouped_linear::planned_op>::call));
  library.impl("_grouped_linear_native_backward", TORCH_BOX(&WithLists<grouped_linear::backward_op>::call));
}

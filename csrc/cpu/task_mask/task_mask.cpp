// task_mask on a CPU: dead channels are zeroed without being read. The contract is fastroute/ops/task_mask/reference.py.
//
// Axes: B samples, C channels, S positions: the axes after the channels that can be walked as one.

#include "cpu/task_mask/task_mask.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "common/task_mask_walk.h"
#include "cpu/empty.h"
#include "cpu/task_mask/tasks.h"

namespace fastroute::task_mask {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// In place, dead planes of a tensor this large are zeroed past the caches: lines that are only written need not be read
// first. What fits a cache is still there from the layer before, and throwing it out costs four times as much as writing
// into it. From 40 MiB on streaming wins, also counting a layer after it that reads everything; up to 32 MiB it loses.
constexpr int64_t kStreamBytes = int64_t{40} << 20;
constexpr int64_t kStreamPlane = 512;  // bytes: of less than that too much is half cache lines

// out = x where a channel takes part, rectified if relu, or where y > 0 if there is a y; 0 elsewhere. out may be x.
template <class S>
class Masking {
 public:
  Masking(const Walk& walk, const Live& live, S* out, const S* x, const S* y, bool relu)
      : walk_(walk), live_(live), out_(out), x_(x), y_(y), relu_(relu) {
    const int64_t plane = walk.positions.size * static_cast<int64_t>(sizeof(S));
    stream_ = out == x && plane >= kStreamPlane &&
              plane * walk.channels.size * walk.batch.size * walk.outer_size >= kStreamBytes;
  }

  void run() const {
    const int64_t S_ = walk_.positions.size, C = walk_.channels.size, slabs = walk_.batch.size * walk_.outer_size;
    if (walk_.by_planes()) {
      in_threads(slabs * C, S_, [&](int64_t begin, int64_t end) { planes(begin, end); });
    } else if (walk_.by_rows()) {
      in_threads(slabs * S_, C, [&](int64_t begin, int64_t end) { rows(begin, end); });
    } else {
      in_threads(slabs, C * S_, [&](int64_t begin, int64_t end) { scattered(begin, end); });
    }
  }

 private:
  template <class F>
  static void in_threads(int64_t units, int64_t numbers, const F& f) {
    if (units * numbers < 2 * kThreadNumbers) {
      f(0, units);
    } else {
      torch::stable::parallel_for(0, units, std::max<int64_t>(1, kThreadNumbers / std::max<int64_t>(1, numbers)), f);
    }
  }

  // Units are planes of dense positions, channel by channel.
  void planes(int64_t begin, int64_t end) const {
    const int64_t C = walk_.channels.size;
    const bool nothing_but_zeros = out_ == x_ && y_ == nullptr && !relu_;
    Dead dead(C);
    for (int64_t unit = begin; unit < end;) {
      const int64_t slab = unit / C, b = slab / walk_.outer_size, first = unit - slab * C;
      const auto at = walk_.offsets(b, slab % walk_.outer_size);
      const int64_t last = std::min(C, first + (end - unit));
      if (nothing_but_zeros) {
        zero_planes(out_ + at[0], dead.of(live_.row(b)), first, last);
      } else {
        all_planes(at, live_.row(b), first, last);
      }
      unit += last - first;
    }
    if (stream_) {
      functions<S>().end_stream();  // waits for the stores: after every plane it would cost what they save
    }
  }

  // Dead channels in rising order, and after them the first again.
  class Dead {
   public:
    explicit Dead(int64_t C) : C_(C) {}
    const std::vector<int64_t>& of(const float* row) {
      if (found_.empty() || row != held_) {
        found_.clear();
        for (int64_t c = 0; c < C_; ++c) {
          if (row == nullptr || row[c] == 0.0f) {
            found_.push_back(c);
          }
        }
        found_.push_back(found_.empty() ? 0 : C_ + found_[0]);
        held_ = row;
      }
      return found_;
    }

   private:
    int64_t C_;
    std::vector<int64_t> found_;
    const float* held_ = nullptr;
  };

  // The dead planes of channels first to last, in place. What comes next is fetched: they are too short for a processor
  // to see it coming. Beyond the sample's end that may be wrong, or outside the tensor, which a fetch does not mind.
  void zero_planes(S* out, const std::vector<int64_t>& dead, int64_t first, int64_t last) const {
    const Functions<S>& with = functions<S>();
    const int64_t n = walk_.positions.size, stride = walk_.channels.strides[0];
    auto at = std::lower_bound(dead.begin(), dead.end() - 1, first);
    for (; at != dead.end() - 1 && *at < last; ++at) {
      if (stream_) {
        with.stream_zeros(out + *at * stride, n);
      } else {
        with.zeros(out + *at * stride, out + at[1] * stride, n);
      }
    }
  }

  void all_planes(const std::array<int64_t, kOperands>& at, const float* row, int64_t first, int64_t last) const {
    const Functions<S>& with = functions<S>();
    const int64_t n = walk_.positions.size;
    const auto& stride = walk_.channels.strides;
    for (int64_t c = first; c < last; ++c) {
      S* out = out_ + at[0] + c * stride[0];
      const S* x = x_ + at[1] + c * stride[1];
      if (row == nullptr || row[c] == 0.0f) {
        if (stream_) {
          with.stream_zeros(out, n);
        } else {
          std::memset(static_cast<void*>(out), 0, static_cast<size_t>(n) * sizeof(S));
        }
      } else if (y_ != nullptr) {
        with.gate(out, x, y_ + at[2] + c * stride[2], n);
      } else if (relu_) {
        with.relu(out, x, n);
      } else if (out != x) {
        std::memcpy(static_cast<void*>(out), x, static_cast<size_t>(n) * sizeof(S));
      }
    }
  }

  // Units are rows of dense channels, position by position.
  void rows(int64_t begin, int64_t end) const {
    const Functions<S>& with = functions<S>();
    const int64_t C = walk_.channels.size, n = walk_.positions.size;
    const std::unique_ptr<BitsOf<S>[]> mask(new BitsOf<S>[C]);
    const float* held = nullptr;
    for (int64_t unit = begin; unit < end;) {
      const int64_t slab = unit / n, b = slab / walk_.outer_size, first = unit - slab * n;
      const auto at = walk_.offsets(b, slab % walk_.outer_size);
      const float* row = live_.row(b);
      if (row != nullptr && row != held) {
        with.mask_row(mask.get(), row, C);
        held = row;
      }
      const int64_t last = std::min(n, first + (end - unit));
      for (int64_t s = first; s < last; ++s) {
        const auto& stride = walk_.positions.strides;
        S* out = out_ + at[0] + s * stride[0];
        const S* x = x_ + at[1] + s * stride[1];
        if (row == nullptr) {
          std::memset(static_cast<void*>(out), 0, static_cast<size_t>(C) * sizeof(S));
        } else if (y_ != nullptr) {
          with.keep_gate(out, x, y_ + at[2] + s * stride[2], mask.get(), C);
        } else if (relu_) {
          with.keep_relu(out, x, mask.get(), C);
        } else {
          with.keep(out, x, mask.get(), C);
        }
      }
      unit += last - first;
    }
  }

  // Neither axis is dense in all tensors: number by number.
  void scattered(int64_t begin, int64_t end) const {
    const Functions<S>& with = functions<S>();
    const int64_t C = walk_.channels.size, n = walk_.positions.size;
    for (int64_t slab = begin; slab < end; ++slab) {
      const int64_t b = slab / walk_.outer_size;
      const auto at = walk_.offsets(b, slab % walk_.outer_size);
      const float* row = live_.row(b);
      for (int64_t c = 0; c < C; ++c) {
        const bool is_live = row != nullptr && row[c] != 0.0f;
        for (int64_t s = 0; s < n; ++s) {
          const auto where = [&](size_t k) {
            return at[k] + c * walk_.channels.strides[k] + s * walk_.positions.strides[k];
          };
          S v = is_live ? x_[where(1)] : S(0);
          if (is_live && y_ != nullptr) {
            with.gate(&v, &v, y_ + where(2), 1);
          } else if (is_live && relu_) {
            with.relu(&v, &v, 1);
          }
          out_[where(0)] = v;
        }
      }
    }
  }

  const Walk& walk_;
  const Live& live_;
  S* out_;
  const S *x_, *y_;
  bool relu_, stream_;
};

void run(const Tensor& out, const Tensor& x, const Tensor* y, const Live& live, bool relu) {
  const Walk walk({&out, &x, y});
  if (out.numel() == 0) {
    return;
  }
  with_type(out.scalar_type(), [&](auto number) {
    using S = decltype(number);
    Masking<S>(walk, live, static_cast<S*>(out.data_ptr()), static_cast<const S*>(x.data_ptr()),
               y == nullptr ? nullptr : static_cast<const S*>(y->data_ptr()), relu)
        .run();
  });
}

Tensor gate_op(const Tensor& g, const OptionalTensor& y, const Tensor& mapping, const OptionalTensor& tasks, int64_t task) {
  check_operands(Check("task_mask"), g, if_given(y));
  const Live live(mapping, tasks, task, g);
  Tensor out = empty_like_cpu(g);
  run(out, g, if_given(y), live, false);
  return out;
}

Tensor rectify_op(const Tensor& x, const Tensor& mapping, const OptionalTensor& tasks, int64_t task) {
  check_operands(Check("task_mask"), x, nullptr);
  const Live live(mapping, tasks, task, x);
  Tensor out = empty_like_cpu(x);
  run(out, x, nullptr, live, true);
  return out;
}

void mask_op(Tensor x, const Tensor& mapping, const OptionalTensor& tasks, int64_t task, bool relu) {
  const Check check("task_mask");
  check_operands(check, x, nullptr, Layout::kApart);
  const Live live(mapping, tasks, task, x);
  check.apart({&x}, {&mapping, if_given(tasks)});
  run(x, x, nullptr, live, relu);
}

}  // namespace
}  // namespace fastroute::task_mask

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, library) {
  library.impl("_task_mask_gate_native", TORCH_BOX(&fastroute::task_mask::gate_op));
  library.impl("_task_mask_rectify_native", TORCH_BOX(&fastroute::task_mask::rectify_op));
  library.impl("_task_mask_mask__native", TORCH_BOX(&fastroute::task_mask::mask_op));
}

// csrc/common/dispatch_plan.h with loops for threads: reads calls from standard input, prints their plans.
// A call: N K stride warps backwards, then (N - 1) stride + 1 actions. Compiled by test_native_dispatch.py.

#include <array>
#include <cstdio>
#include <memory>

#include "common/dispatch_plan.h"

namespace {

using fastroute::kWarp;

struct Warp {
  int at;
  int index() const { return at; }
  template <class F>
  auto lanes(F&& f) const {
    std::array<decltype(f(0)), kWarp> made;
    for (int lane = 0; lane < kWarp; ++lane) made[lane] = f(lane);
    return made;
  }
  template <class F, class... T>
  void each(F&& f, const T&... of_lane) const {
    for (int lane = 0; lane < kWarp; ++lane) f(lane, of_lane[lane]...);
  }
  auto match(const std::array<int, kWarp>& key) const {
    std::array<uint32_t, kWarp> same{};
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int other = 0; other < kWarp; ++other) same[lane] |= uint32_t{key[lane] == key[other]} << other;
    }
    return same;
  }
  auto scan(std::array<int32_t, kWarp> value) const {
    for (int lane = 1; lane < kWarp; ++lane) value[lane] += value[lane - 1];
    return value;
  }
  int32_t last(const std::array<int32_t, kWarp>& value) const { return value[kWarp - 1]; }
  int lowest(uint32_t lanes) const { return __builtin_ctz(lanes); }
  int count(uint32_t lanes) const { return __builtin_popcount(lanes); }
  void sync() const {}
};

struct Block {
  int size;
  bool backwards;  // threads come in the other order
  int warps() const { return size; }
  template <class F>
  void each_thread(int n, F&& f) const {
    for (int i = 0; i < n; ++i) f(backwards ? n - 1 - i : i);
  }
  template <class F>
  void each_warp(F&& f) const {
    for (int w = 0; w < size; ++w) {
      Warp warp{backwards ? size - 1 - w : w};
      f(warp);
    }
  }
  void add(int32_t* to, int32_t value) const { *to += value; }
  void sync() const {}
};

}  // namespace

int main() {
  int N, K, stride, warps, backwards;
  while (std::scanf("%d %d %d %d %d", &N, &K, &stride, &warps, &backwards) == 5) {
    const int read = N > 0 ? (N - 1) * stride + 1 : 0;
    const std::unique_ptr<int64_t[]> actions(new int64_t[read]), order(new int64_t[N]), offsets(new int64_t[K + 1]);
    for (int i = 0; i < read; ++i) {
      if (std::scanf("%ld", &actions[i]) != 1) return 1;
    }
    if (warps == 0) warps = fastroute::plan_warps(N, K);
    const int64_t bytes = fastroute::plan_shared_bytes(warps, K);
    if (warps > 32 || bytes > fastroute::kPlanShared) return 2;
    const std::unique_ptr<int32_t[]> scratch(new int32_t[bytes / 4]);
    int64_t beyond = -1;
    Block block{warps, backwards != 0};
    fastroute::dispatch_plan(block, {actions.get(), stride, N, K, order.get(), offsets.get(), &beyond}, scratch.get());
    for (int i = 0; i < N; ++i) std::printf("%ld ", order[i]);
    for (int k = 0; k <= K; ++k) std::printf("%ld ", offsets[k]);
    std::printf("%ld\n", beyond);
  }
  return 0;
}

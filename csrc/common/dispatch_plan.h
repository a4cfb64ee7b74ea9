// The plan of dispatch by one block of threads: a stable counting sort, each warp counting a segment of its own.
//
// What a block and a warp can do is a template argument: threads on a GPU (csrc/cuda/dispatch.cu), loops in a test on
// the host. Integers only, so the order in which threads come changes nothing.
// Axes: N entries, K modules, W warps; an entry's key is its module, or K if it is dropped.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTROUTE_DEVICE __device__
#else
#define FASTROUTE_DEVICE
#endif

namespace fastroute {

constexpr int kWarp = 32;
constexpr int64_t kPlanEntries = 16384;      // NATIVE_ENTRIES in fastroute/ops/dispatch/op.py
constexpr int64_t kPlanShared = 48 * 1024;   // bytes that every block may use
constexpr int64_t kPlanModules = kPlanShared / 8 - 2;  // NATIVE_MODULES: counts of one warp, their sums, one number

// Warps whose counts fit; no more than there are entries for.
inline int plan_warps(int64_t N, int64_t K) {
  const int64_t fit = (kPlanShared / 4 - 1) / (K + 1) - 1, useful = (N + kWarp - 1) / kWarp;
  const int64_t warps = fit < useful ? fit : useful;
  return static_cast<int>(warps < 1 ? 1 : warps > 32 ? 32 : warps);
}

inline int64_t plan_shared_bytes(int warps, int64_t K) {
  return ((warps + 1) * (K + 1) + 1) * 4;
}

struct PlanArguments {
  const int64_t* actions;
  int64_t stride;
  int N, K;
  int64_t *order, *offsets, *beyond;
};

// scratch: plan_shared_bytes, counts [W, K + 1], then starts [K + 1], then one number.
template <class Block>
FASTROUTE_DEVICE void dispatch_plan(Block& block, const PlanArguments& a, int32_t* scratch) {
  const int K = a.K, keys = K + 1, W = block.warps();
  int32_t *counts = scratch, *starts = counts + W * keys, *above = starts + keys;
  const int steps = (a.N + kWarp * W - 1) / (kWarp * W);  // of a warp's segment

  const auto key_of = [&](int i) {
    const int64_t action = a.actions[i * a.stride];
    return action >= 0 && action < K ? static_cast<int>(action) : K;
  };
  // Steps of a warp over its segment, with every lane's entry, key and the lanes of the same key.
  const auto segment = [&](auto& warp, auto&& step) {
    const int32_t* of_warp = counts + warp.index() * keys;
    for (int s = 0; s < steps; ++s) {
      const int first = (warp.index() * steps + s) * kWarp;
      if (first >= a.N) break;
      const auto key = warp.lanes([&](int lane) { return first + lane < a.N ? key_of(first + lane) : keys; });
      const auto same = warp.match(key);
      step(first, const_cast<int32_t*>(of_warp), key, same);
    }
  };

  block.each_thread(W * keys + keys + 1, [&](int i) { scratch[i] = 0; });
  block.sync();
  block.each_warp([&](auto& warp) {
    segment(warp, [&](int first, int32_t* own, const auto& key, const auto& same) {
      warp.each([&](int lane, int k, uint32_t peers) {
        if (k < keys && lane == warp.lowest(peers)) own[k] += warp.count(peers);
        if (k == K && a.actions[(first + lane) * a.stride] >= K) block.add(above, 1);
      }, key, same);
      warp.sync();
    });
  });
  block.sync();
  block.each_thread(keys, [&](int k) {  // what earlier warps have of a key, and all have
    int32_t total = 0;
    for (int w = 0; w < W; ++w) {
      const int32_t own = counts[w * keys + k];
      counts[w * keys + k] = total;
      total += own;
    }
    starts[k] = total;
  });
  block.sync();
  block.each_warp([&](auto& warp) {
    if (warp.index() != 0) return;
    int32_t before = 0;
    for (int first = 0; first < keys; first += kWarp) {
      const auto own = warp.lanes([&](int lane) { return first + lane < keys ? starts[first + lane] : 0; });
      const auto upto = warp.scan(own);
      warp.each([&](int lane, int32_t mine, int32_t sum) {
        if (first + lane >= keys) return;
        starts[first + lane] = before + sum - mine;
        a.offsets[first + lane] = before + sum - mine;
      }, own, upto);
      before += warp.last(upto);
    }
  });
  block.sync();
  block.each_warp([&](auto& warp) {
    segment(warp, [&](int first, int32_t* own, const auto& key, const auto& same) {
      warp.each([&](int lane, int k, uint32_t peers) {
        if (k < keys) a.order[starts[k] + own[k] + warp.count(peers & ((1u << lane) - 1))] = first + lane;
      }, key, same);
      warp.sync();
      warp.each([&](int lane, int k, uint32_t peers) {
        if (k < keys && lane == warp.lowest(peers)) own[k] += warp.count(peers);
      }, key, same);
      warp.sync();
    });
  });
  block.each_thread(1, [&](int) { *a.beyond = *above; });
}

}  // namespace fastroute

// The kernels of efficient_routing for each instruction set.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "cpu/efficient_routing/efficient_routing.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the baseline's registers never cross a call

namespace fastroute::efficient_routing {

#define FASTROUTE_EACH_ISA "cpu/efficient_routing/kernels.inc"
#include "common/each_isa.inc"

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T> chosen = FASTROUTE_CHOOSE(make<T>());
  return chosen;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace fastroute::efficient_routing

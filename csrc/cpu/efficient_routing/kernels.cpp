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

FASTROUTE_TABLE(Kernels, kernels, make)

}  // namespace fastroute::efficient_routing

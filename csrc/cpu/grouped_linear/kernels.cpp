// The products of grouped_linear for each instruction set.

#include "common/isa.h"
#include "cpu/grouped_linear/grouped_linear.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the baseline's registers never cross a call

namespace fastroute::grouped_linear {

#define FASTROUTE_EACH_ISA "cpu/grouped_linear/kernels.inc"
#include "common/each_isa.inc"

FASTROUTE_TABLE(Kernels, kernels, make)
template const Kernels<uint16_t>& kernels<uint16_t>();

}  // namespace fastroute::grouped_linear

// The row functions of vector_routing for each instruction set.

#include "common/isa.h"
#include "cpu/vector_routing/vector_routing.h"

namespace fastroute::vector_routing {
#define FASTROUTE_EACH_ISA "cpu/vector_routing/rows.inc"
#include "common/each_isa.inc"

FASTROUTE_TABLE(Functions, rows, functions)

}  // namespace fastroute::vector_routing

// The row functions of matrix_routing for each instruction set.

#include "common/isa.h"
#include "cpu/matrix_routing/matrix_routing.h"

namespace fastroute::matrix_routing {

#define FASTROUTE_EACH_ISA "cpu/matrix_routing/rows.inc"
#include "common/each_isa.inc"

FASTROUTE_TABLE(Functions, rows, functions)

}  // namespace fastroute::matrix_routing

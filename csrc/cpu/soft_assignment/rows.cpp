// The row functions of soft_assignment for each instruction set.

#include "common/isa.h"
#include "cpu/soft_assignment/soft_assignment.h"

#include <limits>

namespace fastroute::soft_assignment {

#define FASTROUTE_EACH_ISA "cpu/soft_assignment/rows.inc"
#include "common/each_isa.inc"

FASTROUTE_TABLE(Functions, rows, functions)

}  // namespace fastroute::soft_assignment

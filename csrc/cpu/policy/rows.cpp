// The row functions of policy for each instruction set.

#include "common/isa.h"
#include "cpu/policy/policy.h"

namespace fastroute::policy {

#define FASTROUTE_EACH_ISA "cpu/policy/rows.inc"
#include "common/each_isa.inc"

FASTROUTE_TABLE(Functions, rows, functions)

}  // namespace fastroute::policy

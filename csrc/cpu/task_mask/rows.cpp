// The passes of task_mask for each instruction set.

#include "common/isa.h"
#include "cpu/task_mask/task_mask.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastroute::task_mask {

#define FASTROUTE_EACH_ISA "cpu/task_mask/rows.inc"
#include "common/each_isa.inc"

FASTROUTE_TABLE(Functions, functions, make)
template const Functions<uint16_t>& functions<uint16_t>();

}  // namespace fastroute::task_mask

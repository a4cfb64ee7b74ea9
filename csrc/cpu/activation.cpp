// The activations for each instruction set.

#include "common/isa.h"
#include "cpu/activation.h"

#include <type_traits>

namespace fastroute::activation {

#define FASTROUTE_EACH_ISA "cpu/activation_rows.inc"
#include "common/each_isa.inc"

FASTROUTE_TABLE(Functions, functions, make)
template const Functions<uint16_t>& functions<uint16_t>();

}  // namespace fastroute::activation

// Which of the kernels' variants runs (common/each_isa.inc makes them): the best that this processor has, or the one
// that the environment's FASTROUTE_ISA names. Decided once.
#pragma once

namespace fastroute {

enum class Isa { kDefault, kAvx2, kAvx512 };

// std::invalid_argument if FASTROUTE_ISA names a variant that is not here.
Isa isa();

}  // namespace fastroute

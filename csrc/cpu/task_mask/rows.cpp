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

template <class S>
const Functions<S>& functions() {
  static const Functions<S> chosen = FASTROUTE_CHOOSE(make<S>());
  return chosen;
}

template const Functions<float>& functions<float>();
template const Functions<double>& functions<double>();
template const Functions<uint16_t>& functions<uint16_t>();

}  // namespace fastroute::task_mask

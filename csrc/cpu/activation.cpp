// The activations for each instruction set.

#include "common/isa.h"
#include "cpu/activation.h"

#include <type_traits>

namespace fastroute::activation {

#define FASTROUTE_EACH_ISA "cpu/activation_rows.inc"
#include "common/each_isa.inc"

template <class S>
const Functions<S>& functions() {
  static const Functions<S> chosen = FASTROUTE_CHOOSE(make<S>());
  return chosen;
}

template const Functions<float>& functions<float>();
template const Functions<double>& functions<double>();
template const Functions<uint16_t>& functions<uint16_t>();

}  // namespace fastroute::activation

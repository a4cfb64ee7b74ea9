// The row functions of vector_routing for each instruction set.

#include "common/isa.h"
#include "cpu/vector_routing/vector_routing.h"

namespace fastroute::vector_routing {
#define FASTROUTE_EACH_ISA "cpu/vector_routing/rows.inc"
#include "common/each_isa.inc"

template <class T>
const Functions<T>& rows() {
  static const Functions<T> chosen = FASTROUTE_CHOOSE(functions<T>());
  return chosen;
}

template const Functions<float>& rows<float>();
template const Functions<double>& rows<double>();

}  // namespace fastroute::vector_routing

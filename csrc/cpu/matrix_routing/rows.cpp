// The row functions of matrix_routing for each instruction set.

#include "common/isa.h"
#include "cpu/matrix_routing/matrix_routing.h"

namespace fastroute::matrix_routing {

#define FASTROUTE_EACH_ISA "cpu/matrix_routing/rows.inc"
#include "common/each_isa.inc"

template <class T>
const Functions<T>& rows() {
  static const Functions<T> chosen = FASTROUTE_CHOOSE(functions<T>());
  return chosen;
}

template const Functions<float>& rows<float>();
template const Functions<double>& rows<double>();

}  // namespace fastroute::matrix_routing

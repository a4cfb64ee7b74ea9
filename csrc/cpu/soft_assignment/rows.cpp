// The row functions of soft_assignment for each instruction set.

#include "common/isa.h"
#include "cpu/soft_assignment/soft_assignment.h"

#include <limits>

namespace fastroute::soft_assignment {

#define FASTROUTE_EACH_ISA "cpu/soft_assignment/rows.inc"
#include "common/each_isa.inc"

template <class T>
const Functions<T>& rows() {
  static const Functions<T> chosen = FASTROUTE_CHOOSE(functions<T>());
  return chosen;
}

template const Functions<float>& rows<float>();
template const Functions<double>& rows<double>();

}  // namespace fastroute::soft_assignment

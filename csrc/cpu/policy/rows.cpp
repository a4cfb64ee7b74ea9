// The row functions of policy for each instruction set.

#include "common/isa.h"
#include "cpu/policy/policy.h"

namespace fastroute::policy {

#define FASTROUTE_EACH_ISA "cpu/policy/rows.inc"
#include "common/each_isa.inc"

template <class T>
const Functions<T>& rows() {
  static const Functions<T> chosen = FASTROUTE_CHOOSE(functions<T>());
  return chosen;
}

template const Functions<float>& rows<float>();
template const Functions<double>& rows<double>();

}  // namespace fastroute::policy

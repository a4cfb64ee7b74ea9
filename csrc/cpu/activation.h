// What may follow a product, over runs of numbers: what grouped_linear.cpp needs of activation_rows.inc.
#pragma once

#include <cstdint>

namespace fastroute::activation {

// As in fastroute.ops.activations.ACTIVATIONS. The slope of those from kSilu on is told from what they were applied to.
enum Kind : int64_t { kNone, kRelu, kTanh, kSigmoid, kSilu, kGelu, kGeluTanh, kKinds };

// S is the type in memory, uint16_t for bfloat16, which is computed in float.
template <class S>
struct Functions {
  // v becomes act(v)
  void (*apply[kKinds])(S* v, int64_t count);
  // out = grad times the slope, told from the value or, from kSilu on, from what it was applied to
  void (*slope[kKinds])(S* out, const S* grad, const S* kept, int64_t count);
};

// The functions for this processor, chosen once.
template <class S>
const Functions<S>& functions();
extern template const Functions<float>& functions<float>();
extern template const Functions<double>& functions<double>();
extern template const Functions<uint16_t>& functions<uint16_t>();

}  // namespace fastroute::activation

// What policy.cpp needs of policy_rows.inc: functions over tiles of rows, dense [rows, K] in the dtype of sums.
#pragma once

#include <cstdint>

namespace fastroute::policy {

// Indices into fastroute.reference.policy.KINDS.
enum Kind : int64_t { kSoftmax, kScore, kShifted };

template <class T>
struct Functions {
  // at[i]: the first largest (smallest) of row i, or its first NaN
  void (*argmax)(int64_t* at, const T* v, int64_t rows, int64_t K);
  void (*argmin)(int64_t* at, const T* v, int64_t rows, int64_t K);
  void (*divide)(T* v, T by, int64_t count);
  // noise becomes what its largest number wins with: z / temperature - log noise, or (z - min z + shift) / noise
  void (*race_softmax)(T* noise, const T* z, int64_t count);
  void (*race_shifted)(T* noise, const T* z, int64_t rows, int64_t K);
  // the log-probability of each row's action, or its score, 0 where it is negative; z may be overwritten
  void (*value[3])(T* value, T* z, const int64_t* actions, int64_t rows, int64_t K);
  // z becomes its gradient, 0 where the action is negative
  void (*gradient[3])(T* z, const T* grad, const int64_t* actions, T temperature, int64_t rows, int64_t K);
};

// The functions for this processor, chosen once.
template <class T>
const Functions<T>& rows();
extern template const Functions<float>& rows<float>();
extern template const Functions<double>& rows<double>();

}  // namespace fastroute::policy

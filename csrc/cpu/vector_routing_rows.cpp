// The row functions of vector_routing, compiled for each instruction set that matters and chosen when first used: a wheel
// runs on any processor of its architecture.

#include "cpu/vector_routing.h"

namespace fastroute::vector_routing {
namespace baseline {
#include "vector_routing_rows.inc"
}

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTROUTE_MULTIVERSION 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "vector_routing_rows.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#include "vector_routing_rows.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

template <class T>
const Functions<T>& rows() {
  static const Functions<T> chosen = [] {
#ifdef FASTROUTE_MULTIVERSION
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return avx512::functions<T>();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return avx2::functions<T>();
    }
#endif
    return baseline::functions<T>();
  }();
  return chosen;
}

template const Functions<float>& rows<float>();
template const Functions<double>& rows<double>();

}  // namespace fastroute::vector_routing

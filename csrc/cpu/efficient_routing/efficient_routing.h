// efficient_routing in one call per pass: what its driver and its kernels agree upon. T is the dtype of everything.
//
// Axes: B batch, n inputs, m outputs, d width of an input, h width of an output.
#pragma once

#include <cstdint>

namespace fastroute::efficient_routing {

constexpr int64_t kRun = 256;  // terms of one chain of a sum; longer sums are made of such, added up

// c [rows, columns] (+)= a b, a(i, k) = a[i ai + k ak] with one stride 1; b is packed, or its rows lie ldb apart
template <class T>
struct Gemm {
  T* c;
  int64_t ldc;
  const T* a;
  int64_t ai, ak;
  const T* b;
  int64_t ldb, rows, columns, terms;
  bool add, packed;
};

// Rows of one sample, with parameters of the same rows [rows, m]. A row of the block holds <x, P>, leaves with phi
// (forward) or dL, and in a backward pass holds <x, dM> behind it, leaves with phi; a first iteration has no <x, P>.
template <class T>
struct Rows {
  int64_t rows, m;
  T* block;
  int64_t ld;
  const T *use, *ign, *w, *b, *prior, *gate;
  T* scratch;  // 3 m
  T* p;        // [m], added to
  const T* dp;
  T* dgate;
  bool adds_gate;
  int64_t wants;  // 1, or 0 where one row takes what nobody wants
  T *duse, *dign, *dw, *db;
};

template <class T>
struct GateRows {
  int64_t rows, d;
  const T *dgate, *gate, *x;
  int64_t ldx;
  const T* w;
  T scale;
  T *dw, *db, *dx;
  bool adds;
};

template <class T>
struct Kernels {
  int64_t panel;  // columns of a packed panel
  void (*gemm)(const Gemm<T>&);
  void (*pack)(T* to, const T* b, int64_t bk, int64_t bj, int64_t terms, int64_t columns);
  void (*forward[2])(const Rows<T>&);      // [first iteration]
  void (*backward[2][2])(const Rows<T>&);  // [first iteration][adds]
  void (*make_gates)(T* gate, const T* x, int64_t ldx, const T* w, const T* b, T scale, int64_t rows, int64_t d);
  void (*gate_gradients)(const GateRows<T>&);
  void (*norm)(T* z, const T* y, int64_t rows, int64_t h);
  void (*norm_backward)(T* dy, const T* dz, const T* y, int64_t rows, int64_t h);
  void (*multiply)(T* to, const T* a, const T* b, T scale, int64_t count);
  void (*multiply_add)(T* to, const T* a, const T* b, const T* c, int64_t count);
  void (*add_product)(T* to, const T* a, const T* b, int64_t count);
  void (*add_scaled)(T* to, T a, const T* x, int64_t count);
  T (*dot)(const T* x, const T* y, int64_t count);
};

// The kernels for this processor, chosen once.
template <class T>
const Kernels<T>& kernels();
extern template const Kernels<float>& kernels<float>();
extern template const Kernels<double>& kernels<double>();

}  // namespace fastroute::efficient_routing

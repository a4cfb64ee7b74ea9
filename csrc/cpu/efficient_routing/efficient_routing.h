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

// Rows of one sample, with parameters of the same rows [rows, m], or of all rows (strides 0). A row of the block holds
// <x, P>, then in a backward pass <x, dM>, then with linear betas <x, W_use> and <x, W_ign>; a first iteration has no
// <x, P>. It leaves with phi in the first place (forward); dL, phi and the betas' gradients in theirs (backward).
template <class T>
struct Rows {
  int64_t rows, m;
  T* block;
  int64_t ld;
  const T *use, *ign;
  int64_t beta_ld;
  const T *use_bias, *ign_bias;  // of linear betas
  const T *w, *b;
  int64_t score_ld;
  const T *prior, *gate;
  const uint8_t* mask;  // 0: open
  int64_t mask_row, mask_column;
  T* scratch;  // 4 m
  T* p;        // [m], added to
  const T* dp;
  T* dgate;
  bool adds_gate;
  int64_t wants;  // 1, or 0 where one row takes what nobody wants
  T *duse, *dign, *dw, *db;           // of linear betas: dw and db are sums of all rows, duse and dign in the block
  T *duse_bias, *dign_bias;           // sums of all rows
};

template <class T>
struct GateRows {
  int64_t rows, d;
  const T *dgate, *gate, *x;
  int64_t ldx;
  const T* w;
  int64_t w_row, b_row;  // 0: one for all rows, whose gradients are sums
  T scale;
  T *dw, *db, *dx;
  bool adds;
};

// Rows of a first iteration in Gram form: y = x (dG + dG^T), of which dgate and dx are made.
template <class T>
struct GramRows {
  int64_t rows, d;
  const T* x;
  int64_t ldx;
  const T* gate;
  T* y;  // [rows, d]
  const T* dg;  // [d + 1]
  T *dgate, *dx;
  bool adds;
};

template <class T>
struct Kernels {
  int64_t panel;  // columns of a packed panel
  void (*gemm)(const Gemm<T>&);
  void (*pack)(T* to, const T* b, int64_t bk, int64_t bj, int64_t terms, int64_t columns);
  void (*forward[2][2][2])(const Rows<T>&);      // [first iteration][linear betas][masked]
  void (*backward[2][3][2])(const Rows<T>&);     // [first iteration][writes, adds, linear betas][masked]
  void (*one_beta_forward)(const Rows<T>&);      // both betas in one, whose bias is use_bias
  void (*one_beta_backward)(const Rows<T>&);     // <x, v> leaves with the gradient of the beta
  void (*make_gates)(T* gate, const T* x, int64_t ldx, const T* w, int64_t w_row, const T* b, int64_t b_row, T scale,
                     int64_t rows, int64_t d);
  void (*weighted)(T* to, T* sum, const T* x, int64_t ldx, const T* by, int64_t rows, int64_t d);
  void (*gram_rows)(const GramRows<T>&);
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

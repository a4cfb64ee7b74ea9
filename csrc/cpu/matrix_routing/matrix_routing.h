// What matrix_routing's driver and its row functions share. The contract is fastroute/ops/matrix_routing/contract.py; the
// derivation, docs/matrix_routing.md.
//
// Axes: n inputs, m outputs, c rows of a capsule, d its columns before routing and h after, p = m rounded up to whole
// vectors. Whatever has an entry per output is kept with outputs last, [.., p], zeros past m: a vector's lanes are
// outputs, which need nothing from each other but the sums of a softmax. A "row" is one row of an input's capsule [d]; its
// votes are [h, p], so that an input's are [c, h, p] and those of a tile [inputs, c, h, p].
#pragma once

#include <cstdint>

namespace fastroute::matrix_routing {

struct Sizes {
  int64_t B, n, m, c, d, h, p;
  int64_t votes() const { return c * h * p; }   // of an input
  int64_t weights() const { return d * h * p; }  // of W for an input
};

// What outputs were before: l = prior - sum_ch weight (V - mu)^2.
template <class T>
struct Previous {
  const T *prior, *mu, *weight;
};

template <class T>
struct OutGrads {
  const T *center, *g1, *g2, *k, *da;
};

// Sums over inputs, in double.
struct Sums {
  double *N0, *mean, *M2;
};
struct PreviousSums {
  double *A0, *A1, *A2;
};

template <class T>
struct Functions {
  // to [k, p] = from [m, k] turned, zeros past m; and back, written or added
  void (*turn)(T* to, const T* from, int64_t m, int64_t k, int64_t p);
  void (*turn_back)(T* to, const T* from, int64_t m, int64_t k, int64_t p, bool add);
  // V [rows, h, p] = mu [rows, d] W [d, h, p] + bias [row % c, h, p]
  void (*votes)(const Sizes& s, T* V, const T* mu, const T* W, const T* bias, int64_t rows);
  // R and D = gate R of one input; in a first iteration R is `even`; open: 0 or 1, or null
  void (*assign)(const Sizes& s, T* R, T* D, const T* V, const Previous<T>& prev, const T* open, T gate);
  void (*assign_even)(const Sizes& s, T* R, T* D, T even, const T* open, T gate);
  // a += use D - ign (gate - D), over open outputs
  void (*activate)(const Sizes& s, T* a, const T* D, const T* use, const T* ign, const T* open, T gate);
  // put the moments of a tile's inputs to the sums; scratch: 6 p
  void (*moments)(const Sizes& s, const Sums& to, const T* V, const T* D, int64_t inputs, T* scratch);
  // dl of one input (where prev.mu is not null), what comes to its gate, and the betas' gradients, added where not null
  T (*differentiate)(const Sizes& s, T* dl, const T* V, const T* R, const T* D, const OutGrads<T>& g, bool first,
                     const T* use, const T* ign, const T* open, T gate, T* duse, T* dign);
  // V of a tile's inputs becomes dV; prev's sums are added to; scratch: 2 p
  void (*spread)(const Sizes& s, T* V, const T* D, const T* dl, const OutGrads<T>& g, const Previous<T>& prev,
                 const PreviousSums& to, int64_t inputs, T* scratch);
  // dmu [rows, d] (+)= dV [rows, h, p] W^T
  void (*input_gradient)(const Sizes& s, T* dmu, const T* dV, const T* W, int64_t rows, bool add);
  // dW [d, h, p] += mu^T dV, dbias [row % c, h, p] += dV
  void (*weight_gradient)(const Sizes& s, T* dW, T* dbias, const T* mu, const T* dV, int64_t rows);
  // total += part, part = 0
  void (*drain)(double* total, T* part, int64_t count);
};

// The functions for this processor, chosen once.
template <class T>
const Functions<T>& rows();
extern template const Functions<float>& rows<float>();
extern template const Functions<double>& rows<double>();

}  // namespace fastroute::matrix_routing

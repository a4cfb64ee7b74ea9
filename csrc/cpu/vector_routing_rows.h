// The row mathematics of vector_routing: everything between the matrix products, fused, one row of m outputs at a time.
// vector_routing.cpp includes this file once per instruction set, inside a namespace of its own; no guard on purpose.
// Formulas and their derivation: docs/vector_routing.md. One letter arrays are rows of length m.

// exp(x) for x <= 0 in float, to about one unit in the last place: range reduction by ln 2 and a polynomial.
inline __attribute__((always_inline)) float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;  // a NaN stays a NaN
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float k = (x * 1.44269504f + magic) - magic;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float q = 1.0f / 5040;
  q = q * r + 1.0f / 720;
  q = q * r + 1.0f / 120;
  q = q * r + 1.0f / 24;
  q = q * r + 1.0f / 6;
  q = q * r + 0.5f;
  q = q * r + 1.0f;
  q = q * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return q * scale;
}

inline __attribute__((always_inline)) double exp_nonpositive(double x) {
  return __builtin_exp(x);
}

// Below this sum of sigmoids every score of the row is so negative that log sigmoid(z) = z to the last bit, and the
// quotient of sigmoids would underflow; the softmax of z itself takes over.
inline float underflow(float) {
  return 1e-20f;
}
inline double underflow(double) {
  return 1e-200;
}

template <class T>
inline void softmax_of_scores(
    T* R, T& sum, const T* L, const T* w, const T* b, const uint8_t* mask, int64_t mask_stride, int64_t m) {
  T top = 0;
  bool any = false;
  for (int64_t j = 0; j < m; ++j) {
    const T z = L[j] * w[j] + b[j];
    if ((mask == nullptr || !mask[j * mask_stride]) && (!any || z > top)) {
      top = z;
      any = true;
    }
  }
  sum = 0;
  for (int64_t j = 0; j < m; ++j) {
    const bool open = mask == nullptr || !mask[j * mask_stride];
    R[j] = open ? exp_nonpositive(L[j] * w[j] + b[j] - top) : T(0);
    sum += R[j];
  }
}

// R = softmax_j(log sigmoid(z)) = sigma(z_j) / sum_k sigma(z_k) over the open j; minus = sigma(-z) where wanted.
template <class T, bool Masked, bool WantMinus>
inline __attribute__((always_inline)) void responsibilities(
    T* __restrict R, T* __restrict minus, const T* L, const T* w, const T* b, const uint8_t* mask,
    int64_t mask_stride, int64_t m) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < m; ++j) {
    const T z = L[j] * w[j] + b[j];
    const T e = exp_nonpositive(z < 0 ? z : -z);
    const T big = T(1) / (T(1) + e);
    const T small = e * big;
    T s = z < 0 ? small : big;
    if (WantMinus) {
      minus[j] = z < 0 ? big : small;
    }
    if (Masked) {
      s = mask[j * mask_stride] ? T(0) : s;
    }
    R[j] = s;
    sum += s;
  }
  if (__builtin_expect(sum < underflow(T()), 0)) {
    softmax_of_scores(R, sum, L, w, b, Masked ? mask : nullptr, mask_stride, m);
    if (sum == 0) {  // every output is masked: R is 0 throughout
      return;
    }
  }
  const T scale = T(1) / sum;
#pragma omp simd
  for (int64_t j = 0; j < m; ++j) {
    R[j] *= scale;
  }
}

// The first iteration's R: the prior, divided by what of it is open.
template <class T>
inline void prior_of_open(T* R, const T* prior, const uint8_t* mask, int64_t mask_stride, int64_t m) {
  T sum = 0;
  for (int64_t j = 0; j < m; ++j) {
    R[j] = mask[j * mask_stride] ? T(0) : prior[j];
    sum += R[j];
  }
  for (int64_t j = 0; j < m && sum > 0; ++j) {
    R[j] /= sum;
  }
}

template <class T, bool First, bool Masked>
void forward_rows(const Rows<T>& a) {
  const int64_t m = a.m;
  T* R = a.scratch;
  T* p = a.p;
  for (int64_t i = 0; i < a.rows; ++i) {
    T* phi = a.phi + i * a.phi_ld;
    const T* use = a.use + i * a.beta_stride;
    const T* ign = a.ign + i * a.ign_stride;
    const uint8_t* mask = Masked ? a.mask + i * a.mask_row : nullptr;
    const T* r = R;
    if (!First) {
      responsibilities<T, Masked, false>(
          R, nullptr, a.L + i * a.ld, a.w + i * a.score_stride, a.b + i * a.score_stride, mask, a.mask_col, m);
    } else if (Masked) {
      prior_of_open(R, a.prior, mask, a.mask_col, m);
    } else {
      r = a.prior;
    }
    const T f = a.gate[i];
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
      T t = (use[j] + ign[j]) * r[j] - ign[j];
      if (Masked) {
        t = mask[j * a.mask_col] ? T(0) : t;
      }
      phi[j] = f * t;
      p[j] += f * t;
    }
  }
}

// Where a row's parameter gradients go.
enum Sink {
  kWrite,  // rows of their own, first writer
  kAdd,    // rows of their own, added to
  kLinear  // betas' gradients overwrite the betas, for the products that follow; scores' and biases' are summed
};

template <class T, bool First, bool Masked, Sink sink>
void backward_rows(const Rows<T>& a) {
  const int64_t m = a.m;
  T* R = a.scratch;
  T* minus = R + m;
  T* dR = minus + m;
  for (int64_t i = 0; i < a.rows; ++i) {
    T* phi = a.phi + i * a.phi_ld;  // holds <x_i, dM_j> and leaves with phi
    T* L = First ? nullptr : a.L + i * a.ld;  // holds <x_i, P_j> and leaves with dL
    const T* use = a.use + i * a.beta_stride;
    const T* ign = a.ign + i * a.ign_stride;
    T* duse = a.duse + i * a.dbeta_stride;
    T* dign = a.dign + i * a.dign_stride;
    const T* w = a.w + i * a.score_stride;
    const uint8_t* mask = Masked ? a.mask + i * a.mask_row : nullptr;
    const T* r = R;
    if (!First) {
      responsibilities<T, Masked, true>(R, minus, L, w, a.b + i * a.score_stride, mask, a.mask_col, m);
    } else if (Masked) {
      prior_of_open(R, a.prior, mask, a.mask_col, m);
    } else {
      r = a.prior;
    }
    const T f = a.gate[i];
    T df = 0, column = 0;
#pragma omp simd reduction(+ : df, column)
    for (int64_t j = 0; j < m; ++j) {
      T dphi = phi[j] + a.dp[j];
      const T benefit = use[j] + ign[j];
      T t = benefit * r[j] - ign[j];
      if (Masked) {
        const bool open = !mask[j * a.mask_col];
        dphi = open ? dphi : T(0);
        t = open ? t : T(0);
      }
      const T q = f * dphi;
      const T du = q * r[j];
      const T di = du - q;
      df += dphi * t;
      phi[j] = f * t;
      if (!First) {
        const T v = q * benefit;
        dR[j] = v;
        column += r[j] * v;
      }
      if (sink == kAdd) {
        duse[j] += du;
        dign[j] += di;
      } else {
        duse[j] = du;
        dign[j] = di;
      }
      if (sink == kLinear) {
        a.duse_bias[j] += du;
        a.dign_bias[j] += di;
      }
    }
    a.dgate[i] = a.add_dgate ? a.dgate[i] + df : df;
    if (First) {
      continue;
    }
    T* dw = a.dw + i * a.dscore_stride;
    T* db = a.db + i * a.dscore_stride;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
      const T dz = R[j] * (dR[j] - column) * minus[j];
      if (sink == kWrite) {
        dw[j] = dz * L[j];
        db[j] = dz;
      } else {
        dw[j] += dz * L[j];
        db[j] += dz;
      }
      L[j] = dz * w[j];
    }
  }
}

template <class T>
inline T dot(const T* x, const T* y, int64_t d) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) {
    sum += x[k] * y[k];
  }
  return sum;
}

// y += a x
template <class T>
inline void axpy(T* y, T a, const T* x, int64_t d) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    y[k] += a * x[k];
  }
}

template <class T>
void add_to(T* y, const T* x, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    y[k] += x[k];
  }
}

// gate_i = sigma(scale <x_i, w_i> + b_i)
template <class T>
void make_gates(
    T* gate, const T* x, int64_t x_stride, const T* w, int64_t w_stride, const T* b, int64_t b_stride, T scale,
    int64_t rows, int64_t d) {
  for (int64_t i = 0; i < rows; ++i) {
    const T a = scale * dot(x + i * x_stride, w + i * w_stride, d) + b[i * b_stride];
    gate[i] = T(1) / (T(1) + __builtin_exp(-a));
  }
}

// From dgate, the gradients of the gates' parameters (added) and of x (added where dx is not null).
template <class T>
void gate_gradients(
    const T* dgate, const T* gate, const T* x, int64_t x_stride, const T* w, int64_t w_stride, T scale, T* dw,
    int64_t dw_stride, T* db, int64_t db_stride, T* dx, int64_t dx_stride, int64_t rows, int64_t d) {
  for (int64_t i = 0; i < rows; ++i) {
    const T da = dgate[i] * gate[i] * (1 - gate[i]);
    if (dw != nullptr) {
      axpy(dw + i * dw_stride, scale * da, x + i * x_stride, d);
      db[i * db_stride] += da;
    }
    if (dx != nullptr) {
      axpy(dx + i * dx_stride, scale * da, w + i * w_stride, d);
    }
  }
}

template <class T>
Functions<T> functions() {
  Functions<T> f;
  f.forward[0][0] = forward_rows<T, false, false>;
  f.forward[0][1] = forward_rows<T, false, true>;
  f.forward[1][0] = forward_rows<T, true, false>;
  f.forward[1][1] = forward_rows<T, true, true>;
  f.backward[0][0][0] = backward_rows<T, false, false, kWrite>;
  f.backward[0][0][1] = backward_rows<T, false, false, kAdd>;
  f.backward[0][0][2] = backward_rows<T, false, false, kLinear>;
  f.backward[0][1][0] = backward_rows<T, false, true, kWrite>;
  f.backward[0][1][1] = backward_rows<T, false, true, kAdd>;
  f.backward[0][1][2] = backward_rows<T, false, true, kLinear>;
  f.backward[1][0][0] = backward_rows<T, true, false, kWrite>;
  f.backward[1][0][1] = backward_rows<T, true, false, kAdd>;
  f.backward[1][0][2] = backward_rows<T, true, false, kLinear>;
  f.backward[1][1][0] = backward_rows<T, true, true, kWrite>;
  f.backward[1][1][1] = backward_rows<T, true, true, kAdd>;
  f.backward[1][1][2] = backward_rows<T, true, true, kLinear>;
  f.add_to = add_to<T>;
  f.make_gates = make_gates<T>;
  f.gate_gradients = gate_gradients<T>;
  return f;
}

// What soft_assignment needs of rows.inc: functions over tiles of rows of one sample, in the dtype of
// sums T.
//
// Axes: n rows, m outputs, h width of a vote.
#pragma once

#include <cstdint>

namespace fastroute::soft_assignment {

constexpr int64_t kBeyond = 16;  // numbers beyond R, t and w that the functions read and write

// A tile's pairs. Null: not there. Everything is dense [rows, m] but the mask and the gate.
template <class T>
struct Tile {
  const T* scores;
  const T* prior;  // [m], where there are no scores
  const T* gate;   // [rows]
  const T* use;
  const T* ign;
  const bool* mask;  // true = closed
  int64_t mask_row, mask_out;
  T eps;
  int64_t rows, m;
  T *R, *t, *w;  // made by weigh: softmax, phi / f, phi + eps; one array where they are the same
};

// What finish makes of dphi; null: not wanted.
template <class T>
struct Gradients {
  T* gate;
  T *use, *ign;
  bool adds_use, adds_ign;  // to what is there
  T* scores;
};

// Votes [rows, m, h] with any strides but the last, which is 1.
template <class T>
struct Votes {
  T* data;
  int64_t row, out;
};

template <class T>
struct Functions {
  void (*weigh)(const Tile<T>& tile);
  // p [m] += sum_i w_ij
  void (*add_weights)(double* p, const T* w, int64_t rows, int64_t m);
  // M [m, h] += sum_i w_ij V_ij, in groups of rows that are added up in double
  void (*add_votes)(double* M, const T* w, Votes<const T> votes, int64_t rows, int64_t m, int64_t h);
  // dphi_ij = <dM_j, V_ij> + dp_j
  void (*dot_votes)(
      T* dphi, const T* dM, const T* dp, Votes<const T> votes, int64_t rows, int64_t m, int64_t h);
  // V_ij = w_ij dM_j, or += where it adds
  void (*spread)(Votes<T> votes, const T* w, const T* dM, bool adds, int64_t rows, int64_t m, int64_t h);
  // dphi is overwritten
  void (*finish)(const Tile<T>& tile, T* dphi, const Gradients<T>& to);
  void (*add)(double* to, const T* from, int64_t count);
};

// The functions for this processor, chosen once.
template <class T>
const Functions<T>& rows();
extern template const Functions<float>& rows<float>();
extern template const Functions<double>& rows<double>();

}  // namespace fastroute::soft_assignment

// Which of torch's two libraries makes a float32 product; see common/gemm.h.

#include "common/gemm.h"

#include "common/isa.h"

#include <cstdlib>
#include <string_view>

// oneDNN's linear, through torch's C interface. Weak: a torch built without oneDNN lacks it, and is then not asked.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* out);

// Of the libraries that torch's products may use: weak, as each is there or not.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int count);
extern "C" __attribute__((weak)) void omp_set_num_threads(int count);
extern "C" __attribute__((weak)) int omp_get_max_threads();

namespace fastroute {

OneThread::OneThread() {
  if (&omp_set_num_threads != nullptr && &omp_get_max_threads != nullptr) {
    of_openmp_ = omp_get_max_threads();
    if (of_openmp_ > 1) {
      omp_set_num_threads(1);
    }
  }
  if (&MKL_Set_Num_Threads_Local != nullptr) {
    of_mkl_ = MKL_Set_Num_Threads_Local(1);
  }
}

OneThread::~OneThread() {
  if (&MKL_Set_Num_Threads_Local != nullptr) {
    MKL_Set_Num_Threads_Local(of_mkl_);
  }
  if (of_openmp_ > 1) {
    omp_set_num_threads(of_openmp_);
  }
}

bool prefers_onednn() {
  static const bool chosen = [] {
    if (&aoti_torch_cpu__linear_pointwise == nullptr) {
      return false;
    }
    if (const char* asked = std::getenv("FASTROUTE_GEMM")) {
      return std::string_view(asked) == "onednn";
    }
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_is("amd") && isa() == Isa::kAvx512;
#else
    return false;
#endif
  }();
  return chosen;
}

Tensor onednn_linear(const Tensor& a, const Tensor& b, const Tensor* bias) {
  AtenTensorHandle out = nullptr, added = bias == nullptr ? nullptr : bias->get();
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(
      a.get(), b.get(), bias == nullptr ? nullptr : &added, "none", nullptr, 0, nullptr, &out));
  return Tensor(out);
}

bool onednn_multiplies_bfloat16(int64_t rows, int64_t multiply_adds) {
  static const int64_t least = [] {
    constexpr int64_t never = INT64_MAX;
    if (&aoti_torch_cpu__linear_pointwise == nullptr) {
      return never;
    }
#if defined(__x86_64__) && defined(__GNUC__)
    return isa() != Isa::kAvx512 ? never : __builtin_cpu_supports("avx512bf16") ? int64_t{1} << 20 : int64_t{1} << 22;
#else
    return never;
#endif
  }();
  return rows >= 16 && rows * multiply_adds >= least;
}

namespace {

bool prefers_onednn_op() {
  return prefers_onednn();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CompositeExplicitAutograd, library) {
  library.impl("_prefers_onednn", TORCH_BOX(&prefers_onednn_op));
}

}  // namespace fastroute

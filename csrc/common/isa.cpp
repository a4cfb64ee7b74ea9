// See common/isa.h; and what Python asks about it.

#include "common/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastroute {
namespace {

// By Isa; as in ATEN_CPU_CAPABILITY.
constexpr std::array<const char*, 3> kNames{"default", "avx2", "avx512"};

// The variants that this build holds and this processor runs, the best one last.
std::vector<std::string> isas() {
#if defined(FASTROUTE_ONE_ISA) && defined(__AVX512F__)
  return {kNames[2]};
#elif defined(FASTROUTE_ONE_ISA) && defined(__AVX2__)
  return {kNames[1]};
#else
  std::vector<std::string> names{kNames[0]};
#if defined(__x86_64__) && defined(__GNUC__) && !defined(FASTROUTE_ONE_ISA)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names.push_back(kNames[1]);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      names.push_back(kNames[2]);
    }
  }
#endif
  return names;
#endif
}

std::string choose(std::string asked, std::vector<std::string> here) {
  if (here.empty()) {
    throw std::invalid_argument("here: expected at least one variant");
  }
  if (asked.empty() || asked == "auto") {
    return here.back();
  }
  if (std::find(here.begin(), here.end(), asked) != here.end()) {
    return asked;
  }
  std::string expected = "auto";
  for (const std::string& name : here) {
    expected += ", " + name;
  }
#if defined(FASTROUTE_ONE_ISA)
  const char* what = "what this build has";
#else
  const char* what = "what this processor has";
#endif
  throw std::invalid_argument("FASTROUTE_ISA: expected one of " + expected + " (" + what + "), got '" + asked + "'");
}

std::string name_of_isa() {
  return kNames[static_cast<size_t>(isa())];
}

}  // namespace

Isa isa() {
  static const Isa chosen = [] {
    const char* asked = std::getenv("FASTROUTE_ISA");
    const auto name = std::find(kNames.begin(), kNames.end(), choose(asked == nullptr ? "" : asked, isas()));
    return static_cast<Isa>(name - kNames.begin());
  }();
  return chosen;
}

STABLE_TORCH_LIBRARY_IMPL(fastroute, CompositeExplicitAutograd, library) {
  library.impl("_isa", TORCH_BOX(&name_of_isa));
  library.impl("_isas", TORCH_BOX(&isas));
  library.impl("_choose_isa", TORCH_BOX(&choose));
}

}  // namespace fastroute

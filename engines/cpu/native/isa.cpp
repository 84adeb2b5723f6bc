#include "isa.hpp"

#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace edgellm {

#define EDGELLM_DECLARE(isa)           \
  namespace isa {                      \
  const KernelTable& kernel_table();   \
  }
EDGELLM_DECLARE(portable)
#if defined(__x86_64__)
EDGELLM_DECLARE(avx2)
EDGELLM_DECLARE(avx512)
#elif defined(__aarch64__)
EDGELLM_DECLARE(neon)
#endif
#undef EDGELLM_DECLARE

namespace {

struct Isa {
  const char* name;
  const KernelTable& (*kernels)();
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#elif defined(__aarch64__)
bool has_neon_dot() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1UL << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#else
  return true;
#endif
}
#endif

bool always() { return true; }

constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", avx512::kernel_table, has_avx512},
    {"avx2", avx2::kernel_table, has_avx2},
#elif defined(__aarch64__)
    {"neon", neon::kernel_table, has_neon_dot},
#endif
    {"portable", portable::kernel_table, always},
};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.runs_here()) {
      names.emplace_back(isa.name);
    }
  }
  return names;
}

const KernelTable& kernels_of(std::string_view name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.runs_here()) {
      return isa.kernels();
    }
  }
  throw std::invalid_argument("instruction set '" + std::string(name) + "' is not available on this machine");
}

}  // namespace edgellm

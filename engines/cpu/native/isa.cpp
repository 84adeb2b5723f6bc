#include "isa.hpp"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace edgellm {

#define EDGELLM_DECLARE(isa)         \
  namespace isa {                    \
  const KernelTable& kernel_table(); \
  }
EDGELLM_DECLARE(portable)
EDGELLM_DECLARE(reference)
#if defined(__x86_64__)
EDGELLM_DECLARE(avx2)
EDGELLM_DECLARE(avx512)
#if defined(__linux__)
EDGELLM_DECLARE(amx)
#endif
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
#if defined(__linux__)
// The kernel hands the 8 KiB of tile state to a process only on request (Linux, Documentation/arch/x86/xstate.rst).
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1U << 22, kAmxTile = 1U << 24, kAmxInt8 = 1U << 25;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAmxBf16) != 0 &&
         (edx & kAmxTile) != 0 && (edx & kAmxInt8) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
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
#if defined(__linux__)
    {"amx", amx::kernel_table, has_amx},
#endif
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
  if (name == "reference") {
    return reference::kernel_table();
  }
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.runs_here()) {
      return isa.kernels();
    }
  }
  throw std::invalid_argument("instruction set '" + std::string(name) + "' is not available on this machine");
}

}  // namespace edgellm

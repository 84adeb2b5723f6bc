// AVX-512 with AMX: half-precision linears and attention run on tiles, everything else as on AVX-512.
#include "table.hpp"

namespace edgellm::avx512 {
const KernelTable& kernel_table();
}

namespace edgellm::EDGELLM_ISA {

const KernelTable& kernel_table() {
  static const KernelTable table = [] {
    KernelTable kernels = avx512::kernel_table();
    kernels.linear_half = linear_half;
    kernels.attend_fp16 = attend_fp16;
    kernels.attend_int8 = attend_int8;
    return kernels;
  }();
  return table;
}

}  // namespace edgellm::EDGELLM_ISA

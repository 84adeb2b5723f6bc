// AVX-512 with AMX: linears and attention run on tiles, everything else as on AVX-512.
#include "table.hpp"

namespace edgellm::avx512 {
const KernelTable& kernel_table();
}

namespace edgellm::EDGELLM_ISA {

const KernelTable& kernel_table() {
  static const KernelTable table = [] {
    KernelTable kernels = avx512::kernel_table();
    kernels.prepare_half = prepare_half_tiles;
    kernels.linear_half = linear_half;
    kernels.linear_int8 = linear_int8_tiles;
    kernels.linear_int8x16 = linear_int8x16_tiles;
    kernels.linear_int4 = linear_int4_tiles;
    kernels.attend_fp16 = attend_fp16;
    kernels.attend_int8 = attend_int8;
    return kernels;
  }();
  return table;
}

}  // namespace edgellm::EDGELLM_ISA

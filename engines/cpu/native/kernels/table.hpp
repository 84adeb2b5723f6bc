// All kernels of one instruction set, as a table of functions.
#pragma once

#include <cstdint>

#include "activate.hpp"
#include "add.hpp"
#include "attend.hpp"
#include "embed.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "prepare.hpp"
#include "store_kv.hpp"

namespace edgellm {

template <class Args>
using Kernel = void (*)(const Args&, std::int64_t begin, std::int64_t end);
using AttendKernel = void (*)(const AttendArgs&, std::int64_t begin, std::int64_t end, float* scratch);

struct KernelTable {
  Kernel<EmbedArgs> embed_half, embed_int8;
  Kernel<NormArgs> norm_rms, norm_layer;
  Kernel<PrepareArgs> prepare_half, prepare_float, prepare_int8, prepare_int16;
  Kernel<LinearArgs> linear_half, linear_int8, linear_int8x16, linear_int4, linear_int4_float;
  Kernel<StoreKvArgs> store_kv_fp16, store_kv_int8;
  AttendKernel attend_fp16, attend_int8, merge_segments;
  Kernel<ActivateArgs> silu, gelu, gelu_tanh;
  Kernel<AddArgs> add;
};

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

const KernelTable& kernel_table();

}  // namespace edgellm::EDGELLM_ISA
#endif

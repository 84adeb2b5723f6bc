#include "table.hpp"

namespace edgellm::EDGELLM_ISA {

const KernelTable& kernel_table() {
  static constexpr KernelTable table = {
      .embed_half = embed_half,
      .embed_int8 = embed_int8,
      .norm_rms = norm_rms,
      .norm_layer = norm_layer,
      .prepare_half = prepare_half,
      .prepare_float = prepare_float,
      .prepare_int8 = prepare_int8,
      .prepare_int16 = prepare_int16,
      .linear_half = linear_half,
      .linear_int8 = linear_int8,
      .linear_int8x16 = linear_int8x16,
      .linear_int4 = linear_int4,
      .linear_int4_float = linear_int4_float,
      .store_kv_fp16 = store_kv_fp16,
      .store_kv_int8 = store_kv_int8,
      .attend_fp16 = attend_fp16,
      .attend_int8 = attend_int8,
      .merge_segments = merge_segments,
      .silu = silu,
      .gelu = gelu,
      .gelu_tanh = gelu_tanh,
      .add = add_rows,
  };
  return table;
}

}  // namespace edgellm::EDGELLM_ISA

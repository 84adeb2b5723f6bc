#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// Unit: row. Rotates q and k in place, and writes k and v, rounded, into the pool.
struct StoreKvArgs {
  Rows q, k, v;
  const float* q_rotation;  // [max_seq_len, rotary_dim]: cos [rotary_dim/2] then sin; null: no rotation
  const float* k_rotation;
  std::int64_t q_rotary_dim, k_rotary_dim;
  std::int64_t num_heads;
  Placement at;
  KvLayer kv;
};

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

void store_kv_fp16(const StoreKvArgs& args, std::int64_t begin, std::int64_t end);
void store_kv_int8(const StoreKvArgs& args, std::int64_t begin, std::int64_t end);

}  // namespace edgellm::EDGELLM_ISA
#endif

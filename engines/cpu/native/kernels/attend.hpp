#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// Rows of one sequence that walk its KV together: rows [first_row, first_row + rows), at consecutive positions.
struct AttendTask {
  std::int32_t first_row, rows;
  std::int32_t first_position;
  const std::int32_t* blocks;  // the sequence's block table
};

// Unit: task * kv_heads + kv_head. Causal attention of `num_heads / kv_heads` query heads per KV head.
struct AttendArgs {
  Rows q, out;
  const AttendTask* tasks;
  std::int64_t num_heads;
  float scale;
  KvLayer kv;
};

inline constexpr std::int64_t kAttendVectors = 64;  // query rows * heads that walk the cache together

// Floats of scratch memory that `attend` needs per thread.
constexpr std::int64_t attend_scratch_floats(std::int64_t head_dim) {
  const std::int64_t padded = (head_dim + 15) / 16 * 16;
  return 2 * kBlockTokens * padded + kAttendVectors * (2 * padded + kBlockTokens + 2);
}

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

void attend_fp16(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch);
void attend_int8(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch);

}  // namespace edgellm::EDGELLM_ISA
#endif

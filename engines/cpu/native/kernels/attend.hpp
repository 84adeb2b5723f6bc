#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// The softmax of a context is taken over segments of this many tokens, counted from the sequence's first token, and
// the segments' results are merged in order. Where a segment ends is part of the arithmetic: it depends on nothing
// else, so segments may be computed by different threads.
inline constexpr std::int64_t kSegmentTokens = 256;
inline constexpr std::int64_t kAttendVectors = 256;  // query rows * heads that walk the cache together

// Rows of one sequence that walk its KV together: rows [first_row, first_row + rows), at consecutive positions.
struct AttendTask {
  std::int32_t first_row, rows;
  std::int32_t first_position;
  const std::int32_t* blocks;  // the sequence's block table

  std::int32_t tokens() const { return first_position + rows; }
  AttendTask row(std::int32_t i) const { return {first_row + i, 1, first_position + i, blocks}; }
  std::int32_t segments() const { return static_cast<std::int32_t>((tokens() + kSegmentTokens - 1) / kSegmentTokens); }
};

// What a segment gives one vector: the weighted sum of values [head_dim], padded, then its largest score, then its
// total of weights exp(score - largest).
constexpr std::int64_t padded_head(std::int64_t head_dim) { return (head_dim + 31) / 32 * 32; }
constexpr std::int64_t result_floats(std::int64_t head_dim) { return padded_head(head_dim) + 16; }

// A task, or one segment of it.
struct AttendPiece {
  AttendTask task;
  std::int32_t segment;  // counted from 0, or kAllSegments
  float* results;        // of one segment: [kv_heads, vectors, result_floats(head_dim)]
};
inline constexpr std::int32_t kAllSegments = -1;

// Causal attention of `num_heads / kv_heads` query heads per KV head.
// attend: the unit is piece * kv_heads + kv_head; a whole task writes `out`, one segment writes its results.
// merge:  the unit is i * kv_heads + kv_head; the task whose segments are the pieces from split[i] on writes `out`.
struct AttendArgs {
  Rows q, out;
  const AttendPiece* pieces;
  const std::int32_t* split;
  std::int64_t num_heads;
  float scale;
  KvLayer kv;
};

// Floats of scratch memory that `attend` and `merge` need per thread, aligned to 64 bytes: two sets of results, and
// what the hungriest kernel keeps of queries, scores, keys and values.
constexpr std::int64_t attend_scratch_floats(std::int64_t head_dim) {
  const std::int64_t per_vector = 2 * result_floats(head_dim) + padded_head(head_dim) + kSegmentTokens;
  return kAttendVectors * per_vector + (kSegmentTokens + 2 * kBlockTokens) * (padded_head(head_dim) + 2);
}

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

void attend_fp16(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch);
void attend_int8(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch);
void merge_segments(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch);

}  // namespace edgellm::EDGELLM_ISA
#endif

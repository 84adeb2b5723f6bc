// How one step's attention is cut into pieces of work. The cut decides only who computes what, never a result.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.hpp"
#include "kernels/attend.hpp"

namespace edgellm {

class AttentionPlan {
 public:
  // `max_tasks`: how many sequences, and parts of them, a step may have; then nothing is allocated later.
  AttentionPlan(std::int64_t kv_heads, std::int64_t group, std::int64_t head_dim, std::int64_t max_tasks);

  void clear();
  // The rows of one sequence. Many rows are cut into tasks; few rows with a long context into its segments, as long as
  // there is room for their results.
  void add(const AttendTask& rows);

  const std::vector<AttendPiece>& pieces() const { return pieces_; }
  // First pieces of the tasks that were cut into segments.
  const std::vector<std::int32_t>& split() const { return split_; }

 private:
  void add_task(const AttendTask& task);

  std::int64_t kv_heads_, group_, head_dim_;
  std::vector<AttendPiece> pieces_;
  std::vector<std::int32_t> split_;
  AlignedFloats results_;
  std::int64_t results_used_ = 0;
};

}  // namespace edgellm

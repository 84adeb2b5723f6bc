#include "attention_plan.hpp"

#include <algorithm>

namespace edgellm {

namespace {

constexpr std::int64_t kResultFloats = 1 << 21;
constexpr std::int64_t kFewVectors = 16;  // more of them make a task long enough not to be cut into segments

}  // namespace

AttentionPlan::AttentionPlan(std::int64_t kv_heads, std::int64_t group, std::int64_t head_dim, std::int64_t max_tasks)
    : kv_heads_(kv_heads), group_(group), head_dim_(head_dim), results_(aligned_floats(kResultFloats)) {
  pieces_.reserve(max_tasks + kResultFloats / (kv_heads * group * result_floats(head_dim)));
  split_.reserve(max_tasks);
}

void AttentionPlan::clear() {
  pieces_.clear();
  split_.clear();
  results_used_ = 0;
}

void AttentionPlan::add(const AttendTask& rows) {
  const auto task_rows = static_cast<std::int32_t>(kAttendVectors / group_);
  for (std::int32_t row = 0; row < rows.rows; row += task_rows) {
    const std::int32_t count = std::min(rows.rows - row, task_rows);
    add_task({rows.first_row + row, count, rows.first_position + row, rows.blocks});
  }
}

void AttentionPlan::add_task(const AttendTask& task) {
  const std::int64_t vectors = task.rows * group_;
  const std::int64_t segment_floats = kv_heads_ * vectors * result_floats(head_dim_);
  const bool is_few = task.rows == 1 || vectors <= kFewVectors;
  if (task.segments() == 1 || !is_few || results_used_ + task.segments() * segment_floats > kResultFloats) {
    pieces_.push_back({task, kAllSegments, nullptr});
    return;
  }
  split_.push_back(static_cast<std::int32_t>(pieces_.size()));
  for (std::int32_t segment = 0; segment < task.segments(); ++segment) {
    pieces_.push_back({task, segment, results_.get() + results_used_});
    results_used_ += segment_floats;
  }
}

}  // namespace edgellm

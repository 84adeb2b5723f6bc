// Runs a plan: a list of kernels whose arguments were resolved to memory when they were added.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <variant>
#include <vector>

#include "attention_plan.hpp"
#include "isa.hpp"
#include "thread_pool.hpp"

namespace edgellm {

// The paged cache of the engine's layers: bytes [layers, num_blocks, block_bytes].
struct KvMemory {
  std::uint8_t* data;
  std::int64_t num_blocks, block_bytes, kv_heads, head_dim;
  std::int64_t group;  // query heads per KV head, at most kAttendVectors
};

struct Limits {
  std::int64_t max_rows, max_sequences;
};

// One step's batch, as views that must stay valid during `run`; see Batch in engines/base.py.
struct BatchView {
  std::int64_t rows, sequences, selected;
  const std::int32_t* tokens;           // [rows], or null on a later stage
  const float* hidden;                  // [rows, hidden_size], or null on a first stage
  const std::int32_t* row_starts;       // [sequences + 1]
  const std::int32_t* first_positions;  // [sequences]
  const std::int32_t* block_tables;     // [sequences, table_width]
  std::int64_t table_width;
  const std::int32_t* logit_rows;  // [selected]
};

template <class Args>
struct RowOp {
  Kernel<Args> kernel;
  Args args;
  std::int64_t row_work;  // rough cost of a row in floats touched
};
struct InputOp {
  Rows out;
  std::int64_t size;
};
struct EmbedOp {
  Kernel<EmbedArgs> kernel;
  EmbedArgs args;
};
struct LinearOp {
  Kernel<LinearArgs> kernel;
  LinearArgs args;
  std::int64_t next = 0;  // set by Executor::add: the linear after it, or the next step's first; index of its op
};
struct StoreKvOp {
  Kernel<StoreKvArgs> kernel;
  StoreKvArgs args;
};
struct AttendOp {
  AttendKernel kernel, merge;
  AttendArgs args;
};
// out[i] = x[logit_rows[i]]; from here on the step has `selected` rows.
struct SelectOp {
  Rows x, out;
  std::int64_t size;
};

using Op = std::variant<InputOp, EmbedOp, RowOp<NormArgs>, RowOp<PrepareArgs>, LinearOp, StoreKvOp, AttendOp,
                        RowOp<ActivateArgs>, RowOp<AddArgs>, SelectOp>;

class Executor {
 public:
  Executor(std::string_view isa, int threads, Limits limits, KvMemory kv);

  const KernelTable& kernels() const { return kernels_; }
  KvLayer kv_layer(std::int64_t layer) const;
  void add(Op op);
  std::int64_t size() const { return static_cast<std::int64_t>(ops_.size()); }

  // Runs ops [begin, end) in order: a step is all of them, in one call or in several, each from where the last ended.
  // Returns the rows that the step has then. Allocates nothing. The batch must have been validated.
  std::int64_t run(const BatchView& batch, std::int64_t begin, std::int64_t end);

 private:
  void place(const BatchView& batch);
  template <class Body>
  void split(std::int64_t units, std::int64_t chunk, const Body& body);
  std::int64_t row_ops_end(std::int64_t begin, std::int64_t end) const;
  void run_row_ops(std::int64_t begin, std::int64_t end);
  std::int64_t linear_chunk(const LinearArgs& args) const;
  PanelMemory ahead_of(const LinearOp& op, int thread, std::int64_t panel) const;

  void run_op(const InputOp& op, const BatchView& batch);
  void run_op(const EmbedOp& op, const BatchView& batch);
  template <class Args>
  void run_op(const RowOp<Args>&, const BatchView&) {}  // `run_row_ops` does them
  void run_op(const LinearOp& op, const BatchView& batch);
  void run_op(const StoreKvOp& op, const BatchView& batch);
  void run_op(const AttendOp& op, const BatchView& batch);
  void run_op(const SelectOp& op, const BatchView& batch);

  const KernelTable& kernels_;
  KvMemory kv_;
  ThreadPool threads_;
  std::vector<Op> ops_;
  std::int64_t first_linear_ = -1, last_linear_ = -1;

  // Of the current step:
  std::int64_t rows_ = 0;
  std::vector<std::int32_t> positions_;  // [max_rows]
  std::vector<std::int32_t> blocks_;     // [max_rows]
  AttentionPlan attention_;
  std::vector<AlignedFloats> scratch_;  // per thread
};

}  // namespace edgellm

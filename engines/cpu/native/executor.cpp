#include "executor.hpp"

#include <algorithm>
#include <cstring>

namespace edgellm {

namespace {

constexpr std::int64_t kMinimumRowWork = 16384;  // floats: less is not worth another thread
constexpr std::int64_t kChunkPanels = 4;
constexpr std::int64_t kAttendChunks = 4;             // per thread
constexpr std::int64_t kLinearChunks = 16;            // per thread
constexpr std::int64_t kMinimumLinearWork = 1 << 15;  // multiply-adds per chunk

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t panels_of(const LinearArgs& args) { return ceil_div(args.columns, kPanelColumns); }

template <class T>
constexpr bool kIsRowOp = false;
template <class Args>
constexpr bool kIsRowOp<RowOp<Args>> = true;

// 0 for an op that does not work row by row.
std::int64_t row_work(const Op& op) {
  return std::visit(
      [](const auto& alternative) -> std::int64_t {
        if constexpr (kIsRowOp<std::decay_t<decltype(alternative)>>) return alternative.row_work;
        return 0;
      },
      op);
}

// Rows [begin, end) of a row op, of `rows` that the step has.
void run_rows(const Op& op, std::int64_t rows, std::int64_t begin, std::int64_t end) {
  std::visit(
      [&](const auto& alternative) {
        if constexpr (kIsRowOp<std::decay_t<decltype(alternative)>>) {
          auto args = alternative.args;
          if constexpr (requires { args.rows; }) args.rows = rows;
          alternative.kernel(args, begin, end);
        }
      },
      op);
}

}  // namespace

Executor::Executor(std::string_view isa, int threads, Limits limits, KvMemory kv)
    : kernels_(kernels_of(isa)),
      kv_(kv),
      threads_(threads),
      attention_(kv.kv_heads, kv.group, kv.head_dim, limits.max_rows + limits.max_sequences) {
  positions_.resize(limits.max_rows);
  blocks_.resize(limits.max_rows);
  for (int thread = 0; thread < threads; ++thread)
    scratch_.push_back(aligned_floats(attend_scratch_floats(kv.head_dim)));
}

KvLayer Executor::kv_layer(std::int64_t layer) const {
  return {kv_.data + layer * kv_.num_blocks * kv_.block_bytes, kv_.block_bytes, kv_.kv_heads, kv_.head_dim};
}

void Executor::add(Op op) {
  if (auto* linear = std::get_if<LinearOp>(&op)) {
    const auto index = static_cast<std::int64_t>(ops_.size());
    if (first_linear_ < 0) first_linear_ = index;
    if (last_linear_ >= 0) std::get<LinearOp>(ops_[last_linear_]).next = index;
    linear->next = first_linear_;
    last_linear_ = index;
  }
  ops_.push_back(op);
}

std::int64_t Executor::run(const BatchView& batch, std::int64_t begin, std::int64_t end) {
  if (begin == 0) {
    place(batch);
    rows_ = batch.rows;
  }
  for (std::int64_t i = begin; i < end; ++i) {
    if (const std::int64_t after = row_ops_end(i, end); after > i) {
      run_row_ops(i, after);
      i = after - 1;
    } else {
      std::visit([&](const auto& alternative) { run_op(alternative, batch); }, ops_[i]);
    }
  }
  return rows_;
}

void Executor::place(const BatchView& batch) {
  attention_.clear();
  for (std::int64_t sequence = 0; sequence < batch.sequences; ++sequence) {
    const std::int32_t* table = batch.block_tables + sequence * batch.table_width;
    for (std::int32_t row = batch.row_starts[sequence]; row < batch.row_starts[sequence + 1]; ++row) {
      positions_[row] = batch.first_positions[sequence] + row - batch.row_starts[sequence];
      blocks_[row] = table[positions_[row] / kBlockTokens];
    }
    const std::int32_t rows = batch.row_starts[sequence + 1] - batch.row_starts[sequence];
    attention_.add({batch.row_starts[sequence], rows, batch.first_positions[sequence], table});
  }
}

// body(thread, begin, end) over [0, units) in multiples of `chunk`.
template <class Body>
void Executor::split(std::int64_t units, std::int64_t chunk, const Body& body) {
  chunk = std::max(chunk, ceil_div(units, ThreadPool::kMostChunks));
  threads_.run(ceil_div(units, chunk), [&](int thread, std::int64_t begin, std::int64_t end) {
    body(thread, begin * chunk, std::min(units, end * chunk));
  });
}

void Executor::run_op(const InputOp& op, const BatchView& batch) {
  for (std::int64_t row = 0; row < rows_; ++row) {
    std::memcpy(op.out.data + row * op.out.stride, batch.hidden + row * op.size, op.size * sizeof(float));
  }
}

void Executor::run_op(const EmbedOp& op, const BatchView& batch) {
  EmbedArgs args = op.args;
  args.tokens = batch.tokens;
  const std::int64_t chunk = std::max<std::int64_t>(1, kMinimumRowWork / args.channels);
  split(rows_, chunk, [&](int, std::int64_t begin, std::int64_t end) { op.kernel(args, begin, end); });
}

// Of the ops that work row by row, from `begin` on, the end; `begin` if the first one does not.
std::int64_t Executor::row_ops_end(std::int64_t begin, std::int64_t end) const {
  while (begin < end && row_work(ops_[begin]) > 0) ++begin;
  return begin;
}

// Some rows through all of these ops before the next rows, while they are in the cache. The plan gives ops in a row
// buffers that do not overlap.
void Executor::run_row_ops(std::int64_t begin, std::int64_t end) {
  std::int64_t work = 0;
  for (std::int64_t i = begin; i < end; ++i) work += row_work(ops_[i]);
  split(rows_, std::max<std::int64_t>(1, kMinimumRowWork / work), [&](int, std::int64_t first, std::int64_t last) {
    for (std::int64_t i = begin; i < end; ++i) run_rows(ops_[i], rows_, first, last);
  });
}

// How many panels a chunk has.
std::int64_t Executor::linear_chunk(const LinearArgs& args) const {
  const std::int64_t panel_work = std::max<std::int64_t>(1, rows_ * args.channels * kPanelColumns);
  const std::int64_t by_work = ceil_div(kMinimumLinearWork, panel_work);
  const std::int64_t by_threads = ceil_div(panels_of(args), threads_.threads() * kLinearChunks);
  return ceil_div(std::max(by_work, by_threads), kChunkPanels) * kChunkPanels;
}

// What a thread reads after the panels before `panel`: the next ones of its share, or the first of its share of the
// next linear.
PanelMemory Executor::ahead_of(const LinearOp& op, int thread, std::int64_t panel) const {
  const auto share_begin = [&](const LinearArgs& args, int of) {
    const std::int64_t chunk = linear_chunk(args);
    return std::min(panels_of(args), threads_.share_begin(ceil_div(panels_of(args), chunk), of) * chunk);
  };
  if (share_begin(op.args, thread) < panel && panel < share_begin(op.args, thread + 1)) {
    return panel_memory(op.args, panel);
  }
  const LinearArgs& next = std::get<LinearOp>(ops_[op.next]).args;
  return panel_memory(next, share_begin(next, thread));
}

void Executor::run_op(const LinearOp& op, const BatchView&) {
  split(panels_of(op.args), linear_chunk(op.args), [&](int thread, std::int64_t begin, std::int64_t end) {
    LinearArgs args = op.args;
    args.rows = rows_;
    args.ahead = ahead_of(op, thread, end);
    op.kernel(args, begin, end);
  });
}

void Executor::run_op(const StoreKvOp& op, const BatchView&) {
  StoreKvArgs args = op.args;
  args.at = {positions_.data(), blocks_.data()};
  const std::int64_t row_work = (args.num_heads + 2 * args.kv.kv_heads) * args.kv.head_dim;
  const std::int64_t chunk = std::max<std::int64_t>(1, kMinimumRowWork / row_work);
  split(rows_, chunk, [&](int, std::int64_t begin, std::int64_t end) { op.kernel(args, begin, end); });
}

void Executor::run_op(const AttendOp& op, const BatchView&) {
  AttendArgs args = op.args;
  args.pieces = attention_.pieces().data();
  args.split = attention_.split().data();
  const auto run = [&](AttendKernel kernel, std::int64_t count, std::int64_t chunk) {
    split(count * args.kv.kv_heads, chunk,
          [&](int thread, std::int64_t begin, std::int64_t end) { kernel(args, begin, end, scratch_[thread].get()); });
  };
  const auto pieces = static_cast<std::int64_t>(attention_.pieces().size());
  // Neighbours together, as memory is read in order and asked for ahead: whole pieces where there are enough.
  const std::int64_t chunks = threads_.threads() * kAttendChunks;
  const std::int64_t together = pieces / chunks;
  run(op.kernel, pieces, together > 0 ? together * args.kv.kv_heads : ceil_div(pieces * args.kv.kv_heads, chunks));
  if (const auto tasks = static_cast<std::int64_t>(attention_.split().size()); tasks > 0) {
    // About: pieces that are no segments count too.
    const std::int64_t head_work = ceil_div(pieces, tasks) * args.num_heads / args.kv.kv_heads * args.kv.head_dim;
    run(op.merge, tasks, std::max<std::int64_t>(1, kMinimumRowWork / head_work));
  }
}

void Executor::run_op(const SelectOp& op, const BatchView& batch) {
  for (std::int64_t i = 0; i < batch.selected; ++i) {
    const float* x = op.x.data + batch.logit_rows[i] * op.x.stride;
    std::memcpy(op.out.data + i * op.out.stride, x, op.size * sizeof(float));
  }
  rows_ = batch.selected;
}

}  // namespace edgellm

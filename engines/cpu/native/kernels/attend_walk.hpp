// How attention walks a context, whatever computes a segment: segment after segment, each result merged into what came
// before it. A vector is a query head of a row: vector v is head v % group of the KV head's group, of row v / group.
#pragma once

#include <algorithm>

#include "../simd/math.hpp"
#include "attend.hpp"

namespace edgellm::EDGELLM_ISA {

// One KV head's share of a task.
struct Walk {
  const AttendArgs& args;
  const AttendTask& task;
  std::int64_t kv_head;

  std::int64_t head_dim() const { return args.kv.head_dim; }
  std::int64_t group() const { return args.num_heads / args.kv.kv_heads; }
  int vectors() const { return static_cast<int>(task.rows * group()); }
  std::int64_t offset(int v, std::int64_t stride) const {
    return (task.first_row + v / group()) * stride + (kv_head * group() + v % group()) * head_dim();
  }
  const float* query(int v) const { return args.q.data + offset(v, args.q.stride); }
  const std::uint8_t* block(std::int64_t token) const {
    return args.kv.data + task.blocks[token / kBlockTokens] * args.kv.block_bytes;
  }
};

// The tokens of one segment that exist.
struct Segment {
  const Walk& walk;
  std::int64_t first;  // token

  int tokens() const { return static_cast<int>(std::min(walk.task.tokens() - first, kSegmentTokens)); }
  // How many of them vector v may see; at most 0 when all are in its future.
  int visible(int v) const {
    const std::int64_t count = walk.task.first_position + v / walk.group() + 1 - first;
    return static_cast<int>(std::min(count, kSegmentTokens));
  }
  int first_seeing_vector() const {
    const std::int64_t row = std::max<std::int64_t>(0, first - walk.task.first_position);
    return static_cast<int>(row * walk.group());
  }
};

// Results of vectors, one record of result_floats(head_dim) after the other.
struct Results {
  float* data;
  std::int64_t head_dim;

  float* values(int v) const { return data + v * result_floats(head_dim); }
  float& largest(int v) const { return values(v)[padded_head(head_dim)]; }
  float& total(int v) const { return values(v)[padded_head(head_dim) + 1]; }
};

// What the results of up to 16 vectors are multiplied with, before and after, to stand on the larger of their scores.
struct MergeWeights {
  float keep[kLanes], take[kLanes], largest[kLanes];

  MergeWeights(const Results& before, const Results& later, int first, int count) {
    float after[kLanes] = {};
    std::fill_n(largest, kLanes, 0.0F);
    for (int i = 0; i < count; ++i) {
      largest[i] = before.largest(first + i);
      after[i] = later.largest(first + i);
    }
    const F32 both = max(load(largest), load(after));
    store(keep, exp(sub(load(largest), both)));
    store(take, exp(sub(load(after), both)));
    store(largest, both);
  }
};

// Merges the results of a later segment into those before it, for vectors [first, end).
inline void merge(const Results& before, const Results& later, int first, int end) {
  for (int v = first; v < end; v += kLanes) {
    const int count = std::min(end - v, kLanes);
    const MergeWeights weights(before, later, v, count);
    for (int i = 0; i < count; ++i) {
      float* sums = before.values(v + i);
      for (std::int64_t d = 0; d < before.head_dim; d += kLanes) {
        const F32 kept = mul(load(sums + d), set1(weights.keep[i]));
        store(sums + d, fma(load(later.values(v + i) + d), set1(weights.take[i]), kept));
      }
      before.largest(v + i) = weights.largest[i];
      before.total(v + i) = before.total(v + i) * weights.keep[i] + later.total(v + i) * weights.take[i];
    }
  }
}

inline void write_out(const Walk& walk, const Results& results) {
  for (int v = 0; v < walk.vectors(); ++v) {
    float* out = walk.args.out.data + walk.offset(v, walk.args.out.stride);
    const F32 inverse = set1(1.0F / results.total(v));
    for (std::int64_t d = 0; d < walk.head_dim(); d += kLanes) {
      store_n(out + d, mul(load(results.values(v) + d), inverse), static_cast<int>(walk.head_dim() - d));
    }
  }
}

// Scratch memory: two sets of results, then the kernel's own.
struct Scratch {
  Results sums, part;
  float* rest;

  Scratch(float* scratch, std::int64_t head_dim)
      : sums{scratch, head_dim},
        part{scratch + kAttendVectors * result_floats(head_dim), head_dim},
        rest(scratch + 2 * kAttendVectors * result_floats(head_dim)) {}
};

// The KV of the piece after this one, asked for line by line while this one computes. The heads of a piece follow each
// other and share its lines out, in the order of memory: one head's alone, a few lines of each token, read slower.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Walk& next, std::int32_t segment) : walk_(&next) {
    const std::int64_t first = segment == kAllSegments ? 0 : segment * kSegmentTokens;
    const std::int64_t tokens = std::min(next.task.tokens() - first, kSegmentTokens);
    const std::int64_t bytes = (tokens + kBlockTokens - 1) / kBlockTokens * next.args.kv.block_bytes;
    first_block_ = first / kBlockTokens;
    share_at_ = bytes * next.kv_head / next.args.kv.kv_heads;
    share_end_ = bytes * (next.kv_head + 1) / next.args.kv.kv_heads;
  }

  void line() {
    if (at_ >= end_ && !take_block()) return;
    __builtin_prefetch(at_, 0, 2);
    at_ += kLineBytes;
  }
  void lines(int count) {
    for (int i = 0; i < count; ++i) line();
  }

 private:
  // What the next block has of the share.
  bool take_block() {
    if (share_at_ >= share_end_) return false;
    const std::int64_t bytes = walk_->args.kv.block_bytes;
    const std::int64_t offset = share_at_ % bytes;
    at_ = walk_->block((first_block_ + share_at_ / bytes) * kBlockTokens) + offset;
    end_ = at_ + std::min(bytes - offset, share_end_ - share_at_);
    share_at_ += bytes - offset;
    return true;
  }

  static constexpr int kLineBytes = 64;
  const Walk* walk_ = nullptr;
  const std::uint8_t* at_ = nullptr;
  const std::uint8_t* end_ = nullptr;
  std::int64_t first_block_ = 0, share_at_ = 0, share_end_ = 0;  // bytes of the piece's blocks, one after the other
};

// Kernel(walk, scratch) takes the task's queries; run(segment, results, ahead) computes the vectors that see the
// segment. must_part_rows(walk): whether what later rows stored could leak into earlier rows that walk beside them.
template <class Kernel>
void attend_all(const Walk& walk, const Scratch& scratch, Ahead ahead) {
  Kernel kernel(walk, scratch.rest);
  kernel.run(Segment{walk, 0}, scratch.sums, ahead);
  for (std::int64_t first = kSegmentTokens; first < walk.task.tokens(); first += kSegmentTokens) {
    const Segment segment{walk, first};
    kernel.run(segment, scratch.part, ahead);
    merge(scratch.sums, scratch.part, segment.first_seeing_vector(), walk.vectors());
  }
  write_out(walk, scratch.sums);
}

template <class Kernel>
void attend_segment(const Walk& walk, std::int64_t first_token, const Scratch& scratch, Ahead ahead, float* results) {
  Kernel kernel(walk, scratch.rest);
  kernel.run(Segment{walk, first_token}, scratch.part, ahead);
  std::copy_n(scratch.part.data, walk.vectors() * result_floats(walk.head_dim()), results);
}

// `first_vector`: of the walk, among the vectors of the piece.
template <class Kernel>
void attend_piece(const AttendPiece& piece, const Walk& walk, std::int64_t first_vector, const Scratch& scratch,
                  const Ahead& ahead) {
  if (piece.segment == kAllSegments) {
    attend_all<Kernel>(walk, scratch, ahead);
  } else if (piece.segment < walk.task.segments()) {
    const std::int64_t vector = walk.kv_head * piece.task.rows * walk.group() + first_vector;
    float* results = piece.results + vector * result_floats(walk.head_dim());
    attend_segment<Kernel>(walk, piece.segment * kSegmentTokens, scratch, ahead, results);
  }
}

template <class Kernel>
void attend_pieces(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* memory) {
  const Scratch scratch(memory, args.kv.head_dim);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const AttendPiece& piece = args.pieces[unit / args.kv.kv_heads];
    const Walk walk{args, piece.task, unit % args.kv.kv_heads};
    const bool is_last = (unit / args.kv.kv_heads + 1) * args.kv.kv_heads >= end;
    const AttendPiece& next = is_last ? piece : (&piece)[1];
    const Walk next_walk{args, next.task, walk.kv_head};
    const Ahead ahead = is_last ? Ahead() : Ahead(next_walk, next.segment);
    if (piece.task.rows == 1 || !Kernel::must_part_rows(walk)) {
      attend_piece<Kernel>(piece, walk, 0, scratch, ahead);
      continue;
    }
    for (std::int32_t row = 0; row < piece.task.rows; ++row) {
      const AttendTask task = piece.task.row(row);
      attend_piece<Kernel>(piece, Walk{args, task, walk.kv_head}, row * walk.group(), scratch, ahead);
    }
  }
}

}  // namespace edgellm::EDGELLM_ISA

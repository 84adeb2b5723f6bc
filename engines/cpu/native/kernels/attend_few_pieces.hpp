// Pieces of attention whose vectors fit one tile, some heads at a time, whatever the cache holds.
#pragma once

#include "attend_amx.hpp"
#include "attend_block.hpp"

namespace edgellm::EDGELLM_ISA {

// Unit `unit` and those after it, up to `end`, that are heads of the same piece.
struct PieceHeads {
  const AttendPiece& piece;
  Walk walk;
  int heads;

  PieceHeads(const AttendArgs& args, std::int64_t unit, std::int64_t end)
      : piece(args.pieces[unit / args.kv.kv_heads]),
        walk{args, piece.task, unit % args.kv.kv_heads},
        heads(static_cast<int>(std::min(end - unit, args.kv.kv_heads - walk.kv_head))) {}

  std::int64_t first_token() const { return piece.segment == kAllSegments ? 0 : piece.segment * kSegmentTokens; }
};

template <class Value>
const Value* stored_keys(const Walk& walk, std::int64_t token) {
  return HeadRows<Value>(walk, walk.block(token)).keys;
}

// `heads` KV heads of a piece, from the walk's on. next: the keys that are needed afterwards.
// Kernel(walk, heads, scratch) takes their queries; run(segment, results, next) computes them.
template <class Kernel>
void attend_few(const AttendPiece& piece, const Walk& walk, int heads, const Scratch& scratch,
                const typename Kernel::Value* next) {
  Kernel kernel(walk, heads, scratch.rest);
  if (piece.segment != kAllSegments) {
    float* results = piece.results + walk.kv_head * walk.vectors() * result_floats(walk.head_dim());
    kernel.run(Segment{walk, piece.segment * kSegmentTokens}, {results, walk.head_dim()}, next);
    return;
  }
  for (std::int64_t token = 0; token < walk.task.tokens(); token += kSegmentTokens) {
    const Segment segment{walk, token};
    const std::int64_t after = token + kSegmentTokens;
    kernel.run(segment, token == 0 ? scratch.sums : scratch.part,
               after < walk.task.tokens() ? stored_keys<typename Kernel::Value>(walk, after) : next);
    for (int h = 0; token > 0 && h < heads; ++h) {
      const int first = h * walk.vectors();
      merge(scratch.sums, scratch.part, first + segment.first_seeing_vector(), first + walk.vectors());
    }
  }
  for (int h = 0; h < heads; ++h) {
    const Results results{scratch.sums.values(h * walk.vectors()), walk.head_dim()};
    write_out(Walk{walk.args, walk.task, walk.kv_head + h}, results);
  }
}

// As many of the heads as one kernel takes. Returns their number.
template <class Kernel>
int attend_few_heads(const PieceHeads& few, std::int64_t unit, std::int64_t end, const Scratch& scratch) {
  const int heads = std::min(few.heads, Kernel::kHeads);
  const bool is_last = unit + heads >= end;
  const PieceHeads next(few.walk.args, is_last ? unit : unit + heads, end);
  attend_few<Kernel>(few.piece, few.walk, heads, scratch,
                     stored_keys<typename Kernel::Value>(next.walk, next.first_token()));
  return heads;
}

// The same with the fewest columns that hold the vectors.
template <template <int> class Few>
int attend_few_vectors(const PieceHeads& few, std::int64_t unit, std::int64_t end, const Scratch& scratch) {
  const int vectors = few.walk.vectors();
  if (vectors == 1) return attend_few_heads<Few<1>>(few, unit, end, scratch);
  if (vectors == 2) return attend_few_heads<Few<2>>(few, unit, end, scratch);
  if (vectors <= 4) return attend_few_heads<Few<4>>(few, unit, end, scratch);
  if constexpr (Few<1>::kMostVectors > 8) {
    if (vectors > 8) return attend_few_heads<Few<16>>(few, unit, end, scratch);
  }
  return attend_few_heads<Few<8>>(few, unit, end, scratch);
}

// Pieces for which is_few(piece) by Few, the others by Many, in runs.
template <template <int> class Few, class Many, class IsFew>
void attend_few_or_many(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* memory,
                        const IsFew& is_few) {
  const Scratch scratch(memory, args.kv.head_dim);
  for (std::int64_t unit = begin; unit < end;) {
    const PieceHeads piece(args, unit, end);
    if (is_few(piece)) {
      unit += attend_few_vectors<Few>(piece, unit, end, scratch);
      continue;
    }
    std::int64_t after = unit + piece.heads;
    while (after < end && !is_few(PieceHeads(args, after, end))) after += PieceHeads(args, after, end).heads;
    attend_pieces<Many>(args, unit, after, memory);
    unit = after;
  }
}

}  // namespace edgellm::EDGELLM_ISA

// Pieces of attention whose vectors fit one tile, some heads at a time.
#pragma once

#include "attend_few_amx.hpp"

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

  const std::uint16_t* first_keys() const {
    const std::int64_t token = piece.segment == kAllSegments ? 0 : piece.segment * kSegmentTokens;
    return Fp16Block(walk, walk.block(token), 0).keys;
  }
};

// `heads` KV heads of a piece, from the walk's on. next: the keys that are needed afterwards.
template <int N>
void attend_few(const AttendPiece& piece, const Walk& walk, int heads, const Scratch& scratch,
                const std::uint16_t* next) {
  const auto keys = [&](std::int64_t token) { return Fp16Block(walk, walk.block(token), 0).keys; };
  FewKernel<N> kernel(walk, heads, scratch.rest);
  if (piece.segment != kAllSegments) {
    float* results = piece.results + walk.kv_head * walk.vectors() * result_floats(walk.head_dim());
    kernel.run(Segment{walk, piece.segment * kSegmentTokens}, {results, walk.head_dim()}, next);
    return;
  }
  for (std::int64_t token = 0; token < walk.task.tokens(); token += kSegmentTokens) {
    const Segment segment{walk, token};
    const std::int64_t after = token + kSegmentTokens;
    kernel.run(segment, token == 0 ? scratch.sums : scratch.part, after < walk.task.tokens() ? keys(after) : next);
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
template <int N>
int attend_few_heads(const PieceHeads& few, std::int64_t unit, std::int64_t end, const Scratch& scratch) {
  const int heads = std::min(few.heads, FewKernel<N>::kHeads);
  const bool is_last = unit + heads >= end;
  const PieceHeads next(few.walk.args, is_last ? unit : unit + heads, end);
  attend_few<N>(few.piece, few.walk, heads, scratch, next.first_keys());
  return heads;
}

}  // namespace edgellm::EDGELLM_ISA

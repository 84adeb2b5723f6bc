#include "attend_walk.hpp"

namespace edgellm::EDGELLM_ISA {

void merge_segments(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* memory) {
  const Scratch scratch(memory, args.kv.head_dim);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const AttendPiece* pieces = args.pieces + args.split[unit / args.kv.kv_heads];
    const Walk walk{args, pieces->task, unit % args.kv.kv_heads};
    const std::int64_t floats = walk.vectors() * result_floats(walk.head_dim());
    std::copy_n(pieces->results + walk.kv_head * floats, floats, scratch.sums.data);
    for (int s = 1; s < walk.task.segments(); ++s) {
      const Results later{pieces[s].results + walk.kv_head * floats, walk.head_dim()};
      merge(scratch.sums, later, Segment{walk, s * kSegmentTokens}.first_seeing_vector(), walk.vectors());
    }
    write_out(walk, scratch.sums);
  }
}

}  // namespace edgellm::EDGELLM_ISA

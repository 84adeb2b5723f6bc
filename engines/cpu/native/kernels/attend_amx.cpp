// Attention over half KV on AMX tiles, in bf16 with float32 sums. Scores are computed as keys times queries, so that
// keys are used as they lie in the cache and sixteen vectors' scores of a token lie in lanes; weights are turned before
// they meet the values. A vector's place in a tile does not enter its result, so one row goes through tiles too.
#include <limits>

#include "amx_block.hpp"
#include "attend_amx.hpp"
#include "attend_few_amx.hpp"
#include "attend_few_pieces.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

class TileKernel {
 public:
  // Tiles multiply unseen tokens' values with weights of zero, which is zero only if they are finite.
  static bool must_part_rows(const Walk& walk) {
    F32 zeros = zero();
    for (std::int64_t token = walk.task.first_position; token < walk.task.tokens(); ++token) {
      const Fp16Block block(walk, walk.block(token), 0);
      for (std::int64_t d = 0; d < walk.head_dim(); d += kLanes) {
        const int n = static_cast<int>(walk.head_dim() - d);
        zeros = fma(block.value_lanes(static_cast<int>(token % kBlockTokens), d, n), zero(), zeros);
      }
    }
    return reduce_add(zeros) != 0.0F;
  }

  TileKernel(const Walk& walk, float* scratch)
      : depth_(padded_head(walk.head_dim())),
        store_(scratch, walk.head_dim()),
        scores_(scratch + SegmentStore::floats(walk.head_dim())),
        weights_(reinterpret_cast<Bf16*>(scores_ + 2 * kTileVectors * kSegmentTokens)),
        queries_(weights_ + 2 * kTileVectors * kSegmentTokens) {
    for (int v = 0; v < walk.vectors(); v += kTileVectors) load_queries(walk, v);
  }

  void run(const Segment& segment, const Results& results, Ahead& ahead) {
    for (int t = 0; t < segment.tokens(); t += kBlockTokens) {
      load_keys(segment, t, t, store_, ahead);
      load_values(segment, t, t, store_, ahead);
    }
    int v = segment.first_seeing_vector() / kTileVectors * kTileVectors;
    for (; v + kTileVectors < segment.walk.vectors(); v += 2 * kTileVectors) {
      const View views[2] = {View(segment, v), View(segment, v + kTileVectors)};
      score_two(v, views[1].any);
      soften(segment, views[0], v, 0, results);
      soften(segment, views[1], v + kTileVectors, 1, results);
      clear_weights(views[0].any, views[1].any);
      weigh_two(views[1].any, results.values(v));
    }
    if (v < segment.walk.vectors()) {
      const View view(segment, v);
      score_one(v, view.any);
      soften(segment, view, v, 0, results);
      weigh_one(view.any, results.values(v));
    }
  }

 private:
  // queries_ [vectors / 16][depth / 32]: tiles of [16 channel pairs][16 vectors][2].
  void load_queries(const Walk& walk, int first) {
    for (std::int64_t d = 0; d < depth_; d += 32) {
      I32 pairs[kTileVectors];
      for (int i = 0; i < kTileVectors; ++i) {
        const int n = first + i < walk.vectors() ? static_cast<int>(walk.head_dim() - d) : 0;
        const float* q = walk.query(std::min(first + i, walk.vectors() - 1)) + d;
        pairs[i].v = to_bf16(load_n(q, n), load_n(q + std::min(n, 16), n - 16));
      }
      transpose(pairs);
      Bf16* tile = queries_ + first * depth_ + d * kTileVectors;
      for (int i = 0; i < kTileVectors; ++i) _mm512_storeu_si512(tile + 32 * i, pairs[i].v);
    }
  }

  float* scores(int tile, int token) const { return scores_ + (tile * kSegmentTokens + token) * kTileVectors; }
  Bf16* weights(int tile, int token) const { return weights_ + tile * kTileVectors * kSegmentTokens + token; }

  // Scores of sixteen vectors and the 64 tokens from `token` on, whose keys lie from `slot` on.
  void score_64(int first, int slot, int token) {
    const Bf16* queries = queries_ + first * depth_;
    zero_four();
    for (std::int64_t d = 0; d < depth_; d += 32) {
      _tile_loadd(4, queries + d * kTileVectors, kTileRowBytes);
      _tile_loadd(5, store_.key(slot, d), 2 * depth_);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(6, store_.key(slot + 16, d), 2 * depth_);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(7, store_.key(slot + 32, d), 2 * depth_);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(5, store_.key(slot + 48, d), 2 * depth_);
      _tile_dpbf16ps(3, 5, 4);
    }
    store_four(scores(0, token), scores(0, token + 16), scores(0, token + 32), scores(0, token + 48), kTileRowBytes);
  }

  void score_one(int first, int tokens) {
    for (int t = 0; t < tokens; t += 64) score_64(first, t, t);
  }

  // Scores of 32 vectors, 32 tokens at a time: each loaded key meets both tiles of queries.
  void score_two(int first, int tokens) {
    const Bf16* queries = queries_ + first * depth_;
    for (int t = 0; t < tokens; t += 32) {
      zero_four();
      for (std::int64_t d = 0; d < depth_; d += 32) {
        _tile_loadd(4, store_.key(t, d), 2 * depth_);
        _tile_loadd(5, store_.key(t + 16, d), 2 * depth_);
        _tile_loadd(6, queries + d * kTileVectors, kTileRowBytes);
        _tile_loadd(7, queries + (depth_ + d) * kTileVectors, kTileRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      store_four(scores(0, t), scores(0, t + 16), scores(1, t), scores(1, t + 16), kTileRowBytes);
    }
  }

  // weights_ [16, kSegmentTokens], and each vector's largest score and total.
  void soften(const Segment& segment, const View& view, int first, int tile, const Results& results) {
    const __m512 largest = largest_scores(view, tile);
    const __m512 scale = _mm512_set1_ps(segment.walk.args.scale * kLog2E);
    const __m512 shift = _mm512_mul_ps(largest, scale);
    __m512 totals[4] = {};
    int t = 0;
    for (; t + 32 <= view.every; t += 32) {
      soften_block(tile, t, scale, shift, totals, [](int) { return static_cast<__mmask16>(0xffff); });
    }
    for (; t < view.any; t += 32) {
      soften_block(tile, t, scale, shift, totals, [&](int token) { return view.sees(token); });
    }
    alignas(64) float lanes[2][kTileVectors];
    _mm512_store_ps(lanes[0], _mm512_mul_ps(largest, _mm512_set1_ps(segment.walk.args.scale)));
    _mm512_store_ps(lanes[1], _mm512_add_ps(_mm512_add_ps(totals[0], totals[1]), _mm512_add_ps(totals[2], totals[3])));
    for (int i = 0; i < kTileVectors && first + i < segment.walk.vectors(); ++i) {
      results.largest(first + i) = lanes[0][i];
      results.total(first + i) = lanes[1][i];
    }
  }

  __m512 largest_scores(const View& view, int tile) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 even = none;
    __m512 odd = none;
    int t = 0;
    for (; t + 2 <= view.every; t += 2) {
      even = _mm512_max_ps(even, _mm512_loadu_ps(scores(tile, t)));
      odd = _mm512_max_ps(odd, _mm512_loadu_ps(scores(tile, t + 1)));
    }
    for (; t < view.any; ++t) even = _mm512_mask_max_ps(even, view.sees(t), even, _mm512_loadu_ps(scores(tile, t)));
    return _mm512_max_ps(even, odd);
  }

  // 32 tokens' weights; mask(token) are the vectors that see it.
  template <class Mask>
  void soften_block(int tile, int first, __m512 scale, __m512 shift, __m512 (&totals)[4], const Mask& mask) {
    I32 pairs[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __m512 weight[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int t = first + 2 * i + j;
        const __m512 score = _mm512_loadu_ps(scores(tile, t));
        weight[j] = exp2_masked(mask(t), _mm512_fmsub_ps(score, scale, shift));
        totals[(2 * i + j) % 4] = _mm512_add_ps(totals[(2 * i + j) % 4], weight[j]);
      }
      pairs[i].v = interleave(to_bf16({weight[0]}, {weight[1]}));
    }
    transpose(pairs);
    for (int i = 0; i < kTileVectors; ++i) _mm512_storeu_si512(weights(tile, first) + i * kSegmentTokens, pairs[i].v);
  }

  // The first tile's weights of tokens that only the second one sees.
  void clear_weights(int seen, int tokens) {
    for (int t = (seen + 31) / 32 * 32; t < tokens; t += 32) {
      for (int i = 0; i < kTileVectors; ++i) {
        _mm512_storeu_si512(weights(0, t) + i * kSegmentTokens, _mm512_setzero_si512());
      }
    }
  }

  // Adds the weights of 32 tokens, whose values lie at `slot`, times 32 channels of their values: tiles 0 and 1, or 2
  // and 3 for the next 32 channels.
  void weigh_two_columns(int token, int slot, std::int64_t d) {
    _tile_loadd(4, weights(0, token), 2 * kSegmentTokens);
    _tile_loadd(5, store_.value_pair(slot, d), kTileRowBytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, store_.value_pair(slot, d + 16), kTileRowBytes);
    _tile_dpbf16ps(1, 4, 6);
  }
  void weigh_next_two_columns(int token, int slot, std::int64_t d) {
    _tile_loadd(4, weights(0, token), 2 * kSegmentTokens);
    _tile_loadd(7, store_.value_pair(slot, d + 32), kTileRowBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, store_.value_pair(slot, d + 48), kTileRowBytes);
    _tile_dpbf16ps(3, 4, 5);
  }

  // Weights times values of sixteen vectors, over the first `tokens`: 64 channels at a time, and the last 32.
  void weigh_one(int tokens, float* out) {
    std::int64_t d = 0;
    for (; d + 64 <= depth_; d += 64) {
      zero_four();
      for (int t = 0; t < tokens; t += 32) {
        weigh_two_columns(t, t, d);
        weigh_next_two_columns(t, t, d);
      }
      store_four(out + d, out + d + 16, out + d + 32, out + d + 48, result_stride());
    }
    if (d == depth_) return;
    zero_four();
    for (int t = 0; t < tokens; t += 32) weigh_two_columns(t, t, d);
    _tile_stored(0, out + d, result_stride());
    _tile_stored(1, out + d + 16, result_stride());
  }

  // The same of 32 vectors, 32 channels at a time.
  void weigh_two(int tokens, float* out) {
    float* second = out + kTileVectors * result_floats(depth_);
    for (std::int64_t d = 0; d < depth_; d += 32) {
      zero_four();
      for (int t = 0; t < tokens; t += 32) {
        _tile_loadd(4, weights(0, t), 2 * kSegmentTokens);
        _tile_loadd(5, weights(1, t), 2 * kSegmentTokens);
        _tile_loadd(6, store_.value_pair(t, d), kTileRowBytes);
        _tile_loadd(7, store_.value_pair(t, d + 16), kTileRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      store_four(out + d, out + d + 16, second + d, second + d + 16, result_stride());
    }
  }

  std::int64_t result_stride() const { return result_floats(depth_) * sizeof(float); }

  WholeTiles tiles_;
  std::int64_t depth_;  // head_dim, up to whole tiles
  SegmentStore store_;
  float* scores_;  // [2, kSegmentTokens, 16]
  Bf16* weights_;  // [2, 16, kSegmentTokens]
  Bf16* queries_;
};

// Whether one tile holds the vectors, and all rows may walk together.
bool is_few(const PieceHeads& piece) {
  const Walk& walk = piece.walk;
  if (walk.vectors() > FewKernel<1>::kMostVectors || walk.head_dim() % 32 != 0) return false;
  for (int h = 0; piece.piece.task.rows > 1 && h < piece.heads; ++h) {
    if (TileKernel::must_part_rows({walk.args, walk.task, walk.kv_head + h})) return false;
  }
  return true;
}

}  // namespace

void attend_fp16(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* memory) {
  attend_few_or_many<FewKernel, TileKernel>(args, begin, end, memory, is_few);
}

}  // namespace edgellm::EDGELLM_ISA

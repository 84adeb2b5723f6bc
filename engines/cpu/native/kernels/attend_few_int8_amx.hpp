// Up to eight vectors over int8 KV, all heads of a token together, in the order of memory. Keys and values are tile
// operands as they lie; a tile of scores has two columns per vector, for the parts of its query. Each vector's
// arithmetic is that of many vectors, bit by bit.
#pragma once

#include "ask.hpp"
#include "attend_block.hpp"
#include "attend_few_int8_sums.hpp"
#include "attend_few_softmax.hpp"

namespace edgellm::EDGELLM_ISA {

// 16 / N tokens' numbers, in the lanes of N vectors. Sixteen are read.
template <int N>
inline __m512 spread_tokens(const float* tokens) {
  const __m512 lanes = _mm512_loadu_ps(tokens);
  if constexpr (N == 1) return lanes;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, N == 2 ? 1 : N == 4 ? 2 : 3), lanes);
}

// N: 1, 2, 4 or 8: the task's vectors, and zeros. head_dim: whole tiles.
template <int N>
class FewInt8Kernel {
 public:
  using Value = std::int8_t;
  static constexpr int kMostVectors = 8;
  // KV heads that walk together.
  static constexpr int kHeads = std::min(16, 64 / N);

  // `heads` of them from the walk's on.
  FewInt8Kernel(const Walk& walk, int heads, float* scratch)
      : walk_(walk),
        heads_(heads),
        depth_(walk.head_dim()),
        stride_(walk.args.kv.kv_heads * depth_),
        scores_(scratch),
        key_scales_(scores_ + kHeads * N * kSegmentTokens),
        value_scales_(key_scales_ + kHeads * kScaleStride),
        query_scales_(value_scales_ + kHeads * kScaleStride),
        parts_(reinterpret_cast<std::int32_t*>(query_scales_ + kHeads * kLanes)),
        weights_(reinterpret_cast<std::uint16_t*>(parts_ + kHeads * 2 * N * kBlockTokens)),
        queries_(reinterpret_cast<std::int8_t*>(weights_ + kHeads * N * kSegmentTokens)),
        sums_(heads, depth_, queries_ + kHeads * 2 * N * depth_) {
    for (int h = 0; h < heads_; ++h) load_queries(h);
  }

  // results: of [heads][vectors]. next: the keys that are needed afterwards.
  void run(const Segment& segment, const Results& results, const Value* next) {
    const FewView<N> view(segment);
    configure_scores();
    for (int t = 0; t < view.any; t += kBlockTokens) score(segment, t);
    float units[kHeads * N];
    for (int h = 0; h < heads_; ++h) soften(h, view, results, units + h * N);
    sums_.start();
    for (int t = 0; t < view.any; t += kBlockTokens) weigh(segment, t, next);
    const int vectors = walk_.vectors();
    for (int i = 0; i < heads_ * vectors; ++i) {
      const int h = i / vectors;
      const int v = i % vectors;
      sums_.write(h, v, units[h * N + v], results.values(i));
    }
    _tile_release();
  }

 private:
  static constexpr int kScaleStride = kSegmentTokens + kLanes;

  // Tiles 0 to 3 are scores, 4 queries, 5 to 7 keys.
  static void configure_scores() {
    TileConfig config;
    for (int tile = 0; tile < 5; ++tile) config.set(tile, kTileHeight, 8 * N);
    for (int tile = 5; tile < 8; ++tile) config.set(tile, kTileHeight);
    load_config(config);
  }

  // queries_ [heads][depth / 64]: tiles of [16 channel quads][N][high, low][4].
  void load_queries(int head) {
    const Walk walk{walk_.args, walk_.task, walk_.kv_head + head};
    QuerySteps steps[N];
    for (int v = 0; v < walk.vectors(); ++v) steps[v] = QuerySteps(walk.query(v), depth_);
    for (int i = 0; i < kLanes; ++i) query_scales_[head * kLanes + i] = steps[i % N].scale;
    for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
      I32 parts[kTileHeight] = {};
      for (int v = 0; v < walk.vectors(); ++v) {
        steps[v].round(walk.query(v) + d, kTileChannels, parts[2 * v], parts[2 * v + 1]);
      }
      transpose(parts);
      for (int i = 0; i < kTileHeight; ++i) {
        _mm512_mask_storeu_epi32(query(head, d) + 8 * N * i, (1U << 2 * N) - 1, parts[i].v);
      }
    }
  }

  std::int8_t* query(int head, std::int64_t d) const { return queries_ + (head * depth_ + d) * 2 * N; }
  std::int32_t* parts(int head, int token) const { return parts_ + (head * kBlockTokens + token) * 2 * N; }
  float* scores(int head, int token) const { return scores_ + (head * kSegmentTokens + token) * N; }
  float* key_scales(int head, int token) const { return key_scales_ + head * kScaleStride + token; }
  float* value_scales(int head, int token) const { return value_scales_ + head * kScaleStride + token; }
  std::uint16_t* weights(int vector, int token) const { return weights_ + vector * kSegmentTokens + token; }

  // The first head's key, and value, of a block's first token.
  const Value* stored_key(const Segment& segment, int token) const {
    return HeadRows<Value>(walk_, walk_.block(segment.first + token)).keys;
  }
  const Value* stored_value(const Segment& segment, int token) const {
    return stored_key(segment, token) + kBlockTokens * stride_;
  }

  // The first head's scale of a block's first key.
  const std::uint16_t* stored_scales(const Segment& segment, int token) const {
    const std::uint8_t* block = walk_.block(segment.first + token);
    return reinterpret_cast<const std::uint16_t*>(block + 2 * kBlockTokens * stride_) + walk_.kv_head;
  }

  // The share of a block's keys, or values, that falls to `count` heads from `head` on.
  EDGELLM_ASKS void ask(const Value* block, int head, int count) const {
    constexpr int fours = kBlockTokens / 4;
    const int end = (head + count) * fours / heads_;
    for (int i = head * fours / heads_; i < end; ++i) ask_four<kBlockTokens>(block, stride_, i, 0, heads_ * depth_);
  }

  // Scores of a block. Those of tokens that do not exist are anything.
  void score(const Segment& segment, int token) {
    const Value* keys = stored_key(segment, token);
    const bool is_last = token + kBlockTokens >= segment.tokens();
    const Value* next = is_last ? stored_value(segment, 0) : stored_key(segment, token + kBlockTokens);
    const std::uint16_t* scales = stored_scales(segment, token);
    for (int i = 0; i < 2 * walk_.args.kv.kv_heads; ++i) __builtin_prefetch(scales + 32 * i);
    int h = 0;
    for (; h + 2 <= heads_; h += 2) {
      ask(next, h, 2);
      score_two(h, keys + h * depth_);
    }
    if (h < heads_) {
      ask(next, h, 1);
      score_one(h, keys + h * depth_);
    }
    load_scales(scales, key_scales(0, token));
    load_scales(scales + kBlockTokens * walk_.args.kv.kv_heads, value_scales(0, token));
    for (h = 0; h < heads_; ++h) join(h, token);
  }

  void score_two(int head, const Value* keys) {
    const std::int64_t lower = kTileHeight * stride_;
    zero_four();
    for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
      _tile_loadd(4, query(head, d), 8 * N);
      _tile_loadd(5, keys + d, stride_);
      _tile_dpbssd(0, 5, 4);
      _tile_loadd(6, keys + lower + d, stride_);
      _tile_dpbssd(1, 6, 4);
      _tile_loadd(4, query(head + 1, d), 8 * N);
      _tile_loadd(7, keys + depth_ + d, stride_);
      _tile_dpbssd(2, 7, 4);
      _tile_loadd(5, keys + depth_ + lower + d, stride_);
      _tile_dpbssd(3, 5, 4);
    }
    store_four(parts(head, 0), parts(head, kTileHeight), parts(head + 1, 0), parts(head + 1, kTileHeight), 8 * N);
  }

  void score_one(int head, const Value* keys) {
    _tile_zero(0);
    _tile_zero(1);
    for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
      _tile_loadd(4, query(head, d), 8 * N);
      _tile_loadd(5, keys + d, stride_);
      _tile_dpbssd(0, 5, 4);
      _tile_loadd(6, keys + kTileHeight * stride_ + d, stride_);
      _tile_dpbssd(1, 6, 4);
    }
    _tile_stored(0, parts(head, 0), 8 * N);
    _tile_stored(1, parts(head, kTileHeight), 8 * N);
  }

  // A block's scales, [tokens][KV heads] in fp16, to [heads][kScaleStride].
  void load_scales(const std::uint16_t* scales, float* out) const {
    const std::int64_t stride = walk_.args.kv.kv_heads;
    const auto mask = static_cast<__mmask16>((1U << heads_) - 1);
    I32 pairs[kTileHeight];
    for (int i = 0; i < kTileHeight; ++i) {
      const __m256i even = _mm256_maskz_loadu_epi16(mask, scales + 2 * i * stride);
      const __m256i odd = _mm256_maskz_loadu_epi16(mask, scales + (2 * i + 1) * stride);
      pairs[i].v = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    transpose(pairs);
    for (int h = 0; h < heads_; ++h, out += kScaleStride) {
      _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm512_castsi512_si256(pairs[h].v)));
      _mm512_storeu_ps(out + kLanes, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(pairs[h].v, 1)));
    }
  }

  // Scores of a block, in units of the vector's query scale.
  void join(int head, int token) const {
    const __m512i high = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i low = _mm512_add_epi32(high, _mm512_set1_epi32(1));
    for (int i = 0; i < 2 * N; ++i) {
      const __m512i a = _mm512_loadu_si512(parts(head, 0) + 2 * i * kLanes);
      const __m512i b = _mm512_loadu_si512(parts(head, 0) + (2 * i + 1) * kLanes);
      const __m512 whole =
          join_parts(_mm512_permutex2var_epi32(a, high, b), _mm512_permutex2var_epi32(a, low, b), kInt16Base);
      const __m512 scales = spread_tokens<N>(key_scales(head, token + i * kLanes / N));
      _mm512_storeu_ps(scores(head, token) + i * kLanes, _mm512_mul_ps(whole, scales));
    }
  }

  // units: of [vectors], what a step of a weight times its value's scale stands for.
  void soften(int head, const FewView<N>& view, const Results& results, float* units) {
    const __m512 limits = largest_value_scales(head, view);
    const __m512 steps = _mm512_div_ps(_mm512_set1_ps(kWeightSteps), limits);
    const auto round = [&](F32 a, F32 b, int token) {
      const __m512i whole_a = weight_steps(a, value_scales(head, token), steps);
      const __m512i whole_b = weight_steps(b, value_scales(head, token + kLanes / N), steps);
      return low_halves(whole_a, whole_b);
    };
    const __m512 query_units =
        _mm512_mul_ps(_mm512_loadu_ps(query_scales_ + head * kLanes), _mm512_set1_ps(walk_.args.scale));
    const FewSoftmax<N> softmax(view, scores(head, 0), query_units, weights(head * N, 0), round);
    const int vectors = walk_.vectors();
    for (int v = 0; v < vectors; ++v) {
      results.largest(head * vectors + v) = softmax.largest(v);
      results.total(head * vectors + v) = softmax.total(v);
    }
    _mm512_mask_storeu_ps(units, (1U << N) - 1, _mm512_mul_ps(limits, _mm512_set1_ps(1.0F / kWeightSteps)));
  }

  static __m512i weight_steps(F32 weight, const float* scales, __m512 steps) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_mul_ps(weight.v, spread_tokens<N>(scales)), steps));
  }
  static __m512i low_halves(__m512i a, __m512i b) {
    alignas(64) static constexpr std::uint16_t order[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                            22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                            44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(order), b);
  }

  // Of the tokens that each vector sees. Compared as bits, so that a scale that is not a number is the largest.
  __m512 largest_value_scales(int head, const FewView<N>& view) const {
    __m512i largest = _mm512_setzero_si512();
    for (int t = 0; t < view.any; t += kLanes / N) {
      const __m512i scales = _mm512_castps_si512(spread_tokens<N>(value_scales(head, t)));
      largest = _mm512_mask_max_epi32(largest, view.sees(t), largest, scales);
    }
    return _mm512_castsi512_ps(across_tokens<N>(largest, [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }));
  }

  // Adds a block's weights times values.
  void weigh(const Segment& segment, int token, const Value* next_keys) {
    const bool is_last = token + kBlockTokens >= segment.tokens();
    const Value* values = stored_value(segment, token);
    const Value* next = is_last ? next_keys : stored_value(segment, token + kBlockTokens);
    for (int i = 0; i < heads_ * N; ++i) sums_.set_weights(i / N, i % N, weights(i, token));
    for (int h = 0; h < heads_; ++h) {
      ask(next, h, 1);
      sums_.add(h, values + h * depth_, stride_);
    }
  }

  const Walk& walk_;  // of the first head
  int heads_;
  std::int64_t depth_, stride_;  // channels of a head; of a token in the cache
  float* scores_;                // [heads][kSegmentTokens][N]
  float* key_scales_;            // [heads][kScaleStride]
  float* value_scales_;
  float* query_scales_;     // [heads][16]: lanes of N vectors
  std::int32_t* parts_;     // [heads][kBlockTokens][N][high, low]
  std::uint16_t* weights_;  // [heads][N][kSegmentTokens]
  std::int8_t* queries_;
  FewInt8Sums<N> sums_;
};

}  // namespace edgellm::EDGELLM_ISA

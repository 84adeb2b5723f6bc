// Up to sixteen vectors, as when one token is decoded, over half KV: memory is read in the order in which it lies, all
// heads of a token together, and a step asks for the memory of the next one. A tile of scores has one column per
// vector. Each vector's arithmetic is that of many vectors, bit by bit.
#pragma once

#include "amx_block.hpp"
#include "ask.hpp"
#include "attend_few_softmax.hpp"

namespace edgellm::EDGELLM_ISA {

// N: columns of a tile of scores, 1, 2, 4, 8 or 16: the task's vectors, and zeros. head_dim: whole tiles.
template <int N>
class FewKernel {
 public:
  using Value = std::uint16_t;
  static constexpr int kMostVectors = 16;
  // KV heads that walk together.
  static constexpr int kHeads = std::min(16, 64 / N);

  // `heads` of them from the walk's on.
  FewKernel(const Walk& walk, int heads, float* scratch)
      : walk_(walk),
        heads_(heads),
        depth_(walk.head_dim()),
        stride_(walk.args.kv.kv_heads * depth_),
        scores_(scratch),
        sums_(scores_ + kHeads * N * kSegmentTokens),
        weights_(reinterpret_cast<Bf16*>(sums_ + kHeads * N * depth_)),
        queries_(weights_ + kHeads * N * kSegmentTokens),
        keys_(queries_ + kHeads * N * depth_),
        values_(keys_ + kHeads * kTileHeight * depth_) {
    for (int h = 0; h < heads_; ++h) load_queries(h);
  }

  // results: of [heads][vectors]. next: the keys that are needed afterwards.
  void run(const Segment& segment, const Results& results, const std::uint16_t* next) {
    const FewView<N> view(segment);
    const int vectors = walk_.vectors();
    configure_scores();
    for (int t = 0; t < view.any; t += kTileHeight) score(segment, t);
    const __m512 units = _mm512_set1_ps(walk_.args.scale);
    const auto round = [](F32 a, F32 b, int) { return to_bf16(a, b); };
    for (int h = 0; h < heads_; ++h) {
      const FewSoftmax<N> softmax(view, scores(h, 0), units, weights(h, 0), round);
      for (int v = 0; v < vectors; ++v) {
        results.largest(h * vectors + v) = softmax.largest(v);
        results.total(h * vectors + v) = softmax.total(v);
      }
    }
    configure_sums();
    std::fill_n(sums_, heads_ * N * depth_, 0.0F);
    for (int t = 0; t < view.any; t += kBlockTokens) weigh(segment, t, next);
    for (int i = 0; i < heads_ * vectors; ++i) {
      std::copy_n(sums_ + (i / vectors * N + i % vectors) * depth_, depth_, results.values(i));
    }
    _tile_release();
  }

 private:
  static constexpr int kValueHeads = 6;  // whose values of a block stay in L1

  // Tiles 0 to 3 are sums, 4 queries or weights, 5 to 7 keys or values.
  static void configure_scores() {
    TileConfig config;
    for (int tile = 0; tile < 5; ++tile) config.set(tile, kTileHeight, 4 * N);
    for (int tile = 5; tile < 8; ++tile) config.set(tile, kTileHeight);
    load_config(config);
  }
  static void configure_sums() {
    TileConfig config;
    for (int tile = 0; tile < 5; ++tile) config.set(tile, N);
    for (int tile = 5; tile < 8; ++tile) config.set(tile, kTileHeight);
    load_config(config);
  }

  // queries_ [heads][depth / 32]: tiles of [16 channel pairs][N][2].
  void load_queries(int head) {
    const Walk walk{walk_.args, walk_.task, walk_.kv_head + head};
    for (std::int64_t d = 0; d < depth_; d += 32) {
      I32 pairs[kTileVectors] = {};
      for (int v = 0; v < walk.vectors(); ++v) {
        pairs[v].v = to_bf16(load(walk.query(v) + d), load(walk.query(v) + d + kLanes));
      }
      if constexpr (N == 1) {
        _mm512_storeu_si512(query(head, d), pairs[0].v);
      } else {
        transpose(pairs);
        for (int i = 0; i < kTileHeight; ++i) {
          _mm512_mask_storeu_epi32(query(head, d) + 2 * N * i, (1U << N) - 1, pairs[i].v);
        }
      }
    }
  }

  Bf16* query(int head, std::int64_t d) const { return queries_ + (head * depth_ + d) * N; }
  const Bf16* key(int head, std::int64_t d) const { return keys_ + head * depth_ + d; }
  float* scores(int head, int token) const { return scores_ + (head * kSegmentTokens + token) * N; }
  Bf16* weights(int head, int token) const { return weights_ + head * N * kSegmentTokens + token; }

  // The first head's key, and value, of a token.
  const std::uint16_t* stored_key(const Segment& segment, int token) const {
    const Fp16Block block(walk_, walk_.block(segment.first + token), 0);
    return block.keys + token % kBlockTokens * stride_;
  }
  const std::uint16_t* stored_value(const Segment& segment, int token) const {
    return stored_key(segment, token) + kBlockTokens * stride_;
  }

  // A step's memory is asked for in two halves, one while keys or values are converted, in eight parts, and one beside
  // the tile products.
  template <int kTokens>
  EDGELLM_ASKS void ask_part(const std::uint16_t* data, int part, std::int64_t channels) const {
    constexpr int parts = 64 / kTokens;  // of four tokens
    const std::int64_t lines = channels / 32;
    const auto line = [&](int i) { return lines * i / parts * 32; };
    ask_four<kTokens>(data, stride_, part / parts, line(part % parts), line(part % parts + 1));
  }
  template <int kTokens>
  EDGELLM_ASKS void ask_rest(const std::uint16_t* data, std::int64_t channels) const {
    for (int i = kTokens / 8; i < kTokens / 4; ++i) ask_four<kTokens>(data, stride_, i, 0, channels);
  }

  // Scores of sixteen tokens. Those of tokens that do not exist are anything.
  void score(const Segment& segment, int token) {
    const bool is_last = token + kTileHeight >= segment.tokens();
    const std::uint16_t* next = is_last ? stored_value(segment, 0) : stored_key(segment, token + kTileHeight);
    convert_keys_16(stored_key(segment, token), next);
    int h = 0;
    for (; h + 4 <= heads_; h += 4) {
      ask_rest<kTileHeight>(next + h * depth_, 4 * depth_);
      score_four(h, token);
    }
    for (; h < heads_; ++h) {
      ask_rest<kTileHeight>(next + h * depth_, depth_);
      score_one(h, token);
    }
  }

  // keys_ [16, heads, depth].
  void convert_keys_16(const std::uint16_t* keys, const std::uint16_t* next) {
    const std::int64_t width = heads_ * depth_;
    Bf16* out = keys_;
    for (int t = 0; t < kTileHeight; ++t, out += width) {
      if (t < 8) ask_part<kTileHeight>(next, t, width);
      const std::uint16_t* from = keys + t * stride_;
      for (std::int64_t i = 0; i < width; i += 32) {
        _mm512_storeu_si512(out + i, to_bf16(load_f16(from + i), load_f16(from + i + kLanes)));
      }
    }
  }

  void score_four(int head, int token) {
    const std::int64_t stride = 2 * heads_ * depth_;
    zero_four();
    for (std::int64_t d = 0; d < depth_; d += 32) {
      _tile_loadd(4, query(head, d), 4 * N);
      _tile_loadd(5, key(head, d), stride);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(4, query(head + 1, d), 4 * N);
      _tile_loadd(6, key(head + 1, d), stride);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(4, query(head + 2, d), 4 * N);
      _tile_loadd(7, key(head + 2, d), stride);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(4, query(head + 3, d), 4 * N);
      _tile_loadd(5, key(head + 3, d), stride);
      _tile_dpbf16ps(3, 5, 4);
    }
    store_four(scores(head, token), scores(head + 1, token), scores(head + 2, token), scores(head + 3, token), 4 * N);
  }

  void score_one(int head, int token) {
    _tile_zero(0);
    for (std::int64_t d = 0; d < depth_; d += 32) {
      _tile_loadd(4, query(head, d), 4 * N);
      _tile_loadd(5, key(head, d), 2 * heads_ * depth_);
      _tile_dpbf16ps(0, 5, 4);
    }
    _tile_stored(0, scores(head, token), 4 * N);
  }

  // Adds a block's weights times values, some heads at a time.
  void weigh(const Segment& segment, int token, const std::uint16_t* next_keys) {
    const int tokens = std::min(segment.tokens() - token, static_cast<int>(kBlockTokens));
    const bool is_last = token + kBlockTokens >= segment.tokens();
    const std::uint16_t* block = stored_value(segment, token);
    for (int h = 0; h < heads_; h += kValueHeads) {
      const int end = std::min(heads_, h + kValueHeads);
      const std::uint16_t* next = end < heads_ ? block + end * depth_
                                  : is_last    ? next_keys
                                               : stored_value(segment, token + kBlockTokens);
      convert_values_32(block + h * depth_, tokens, (end - h) * depth_, next);
      for (int i = h; i < end; ++i) {
        ask_rest<kBlockTokens>(next + (i - h) * depth_, depth_);
        weigh_one(i, token, values_ + (i - h) * depth_ * kBlockTokens);
      }
    }
  }

  // values_ [channels / 16]: tiles of [16 token pairs][16 channels][2]; zero after the last token.
  void convert_values_32(const std::uint16_t* values, int tokens, std::int64_t channels, const std::uint16_t* next) {
    for (int t = 0; t < kBlockTokens; t += 2) {
      if (t < 16) ask_part<kBlockTokens>(next, t / 2, channels);
      const std::uint16_t* even = values + t * stride_;
      const std::uint16_t* odd = even + stride_;
      Bf16* out = values_ + t * 16;
      for (std::int64_t i = 0; i < channels; i += 16) {
        const F32 a = t < tokens ? load_f16(even + i) : zero();
        const F32 b = t + 1 < tokens ? load_f16(odd + i) : zero();
        _mm512_storeu_si512(out + i * kBlockTokens, interleave(to_bf16(a, b)));
      }
    }
  }

  // sums_ [heads][N][depth].
  void weigh_one(int head, int token, const Bf16* values) {
    const std::int64_t stride = depth_ * static_cast<std::int64_t>(sizeof(float));
    _tile_loadd(4, weights(head, token), 2 * kSegmentTokens);
    for (std::int64_t d = 0; d < depth_; d += 32) {
      float* sums = sums_ + head * N * depth_ + d;
      _tile_loadd(0, sums, stride);
      _tile_loadd(5, values + d * kBlockTokens, kTileRowBytes);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(1, sums + 16, stride);
      _tile_loadd(6, values + (d + 16) * kBlockTokens, kTileRowBytes);
      _tile_dpbf16ps(1, 4, 6);
      _tile_stored(0, sums, stride);
      _tile_stored(1, sums + 16, stride);
    }
  }

  const Walk& walk_;  // of the first head
  int heads_;
  std::int64_t depth_, stride_;  // channels of a head; of a token in the cache
  float* scores_;                // [heads][kSegmentTokens][N]
  float* sums_;
  Bf16* weights_;  // [heads][N][kSegmentTokens]
  Bf16* queries_;
  Bf16* keys_;
  Bf16* values_;
};

}  // namespace edgellm::EDGELLM_ISA

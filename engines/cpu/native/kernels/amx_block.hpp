// A segment of one KV head's cache, converted to bf16 in the layouts that AMX multiplies.
#pragma once

#include <immintrin.h>

#include "attend_block.hpp"

namespace edgellm::EDGELLM_ISA {

using Bf16 = std::uint16_t;

// bf16 [32]: a's lanes, then b's.
inline __m512i to_bf16(F32 a, F32 b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)); }

// 16-bit values [2][16] to [16][2].
inline __m512i interleave(__m512i two) {
  alignas(64) static constexpr std::uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), two);
}

// A segment in scratch memory. Channels after head_dim are zero, and so are values of tokens after the last, up to a
// whole block; keys and scales after it are anything.
struct SegmentStore {
  std::int64_t depth;   // head_dim, up to whole tiles
  Bf16* keys;           // [kSegmentTokens, depth]
  Bf16* values;         // [kSegmentTokens / 32][depth / 16]: tiles of [16 token pairs][16 channels][2]
  float* key_scales;    // [kSegmentTokens], for int8
  float* value_scales;  // [kSegmentTokens]

  static constexpr std::int64_t floats(std::int64_t head_dim) { return kSegmentTokens * (padded_head(head_dim) + 2); }
  SegmentStore(float* memory, std::int64_t head_dim)
      : depth(padded_head(head_dim)),
        keys(reinterpret_cast<Bf16*>(memory)),
        values(keys + kSegmentTokens * depth),
        key_scales(memory + kSegmentTokens * depth),
        value_scales(key_scales + kSegmentTokens) {}
  Bf16* key(int token, std::int64_t d) const { return keys + token * depth + d; }
  // Of the pair that the even `token` begins.
  Bf16* value_pair(int token, std::int64_t d) const {
    return values + token / kBlockTokens * kBlockTokens * depth + d * kBlockTokens + token % kBlockTokens * 16;
  }
};

inline F32 load_values(const std::uint16_t* p) { return load_f16(p); }
inline F32 load_values(const std::int8_t* p) { return load_i8(p); }
inline F32 load_values_n(const std::uint16_t* p, int n) { return load_f16_n(p, n); }
inline F32 load_values_n(const std::int8_t* p, int n) { return load_i8_n(p, n); }

// One block's keys, or values, as they lie in the cache and in the block after it, which is prefetched. `IsWhole`: all
// of its tokens exist, and head_dim needs no padding.
template <class Value, bool IsWhole>
struct TokenRows {
  const Value* data;
  const Value* next;
  std::int64_t stride;
  int tokens, head_dim;

  F32 lanes(int t, std::int64_t d) const {
    if constexpr (IsWhole) return load_values(data + t * stride + d);
    return load_values_n(data + t * stride + d, t < tokens ? head_dim - static_cast<int>(d) : 0);
  }
  void prefetch(int t, std::int64_t d) const { __builtin_prefetch(next + t * stride + d); }
};

template <class Rows>
void convert_keys(const Rows& rows, Bf16* out, std::int64_t depth) {
  for (int t = 0; t < rows.tokens; ++t) {
    for (std::int64_t d = 0; d < depth; d += 32) {
      rows.prefetch(t, d);
      _mm512_storeu_si512(out + t * depth + d, to_bf16(rows.lanes(t, d), rows.lanes(t, d + 16)));
    }
  }
}

template <class Rows>
void convert_values(const Rows& rows, Bf16* out, std::int64_t depth) {
  for (int t = 0; t < kBlockTokens; t += 2) {
    for (std::int64_t d = 0; d < depth; d += 16) {
      rows.prefetch(t + static_cast<int>(d / 16 % 2), d);
      const __m512i pair = to_bf16(rows.lanes(t, d), rows.lanes(t + 1, d));
      _mm512_storeu_si512(out + d * kBlockTokens + t * 16, interleave(pair));
    }
  }
}

// The block of a segment that begins at token `first`, and the block after it.
template <class Block>
struct BlockView {
  using Value = typename Block::Value;
  int tokens, head_dim;
  Block block, next;

  BlockView(const Segment& segment, int first)
      : tokens(std::min(segment.tokens() - first, static_cast<int>(kBlockTokens))),
        head_dim(static_cast<int>(segment.walk.head_dim())),
        block(segment.walk, segment.walk.block(segment.first + first), tokens),
        next(segment.walk, segment.walk.block(after(segment, segment.first + first)), 0) {}

  bool is_whole(std::int64_t depth) const { return tokens == kBlockTokens && head_dim == depth; }
  template <bool IsWhole>
  TokenRows<Value, IsWhole> keys() const {
    return {block.keys, next.keys, block.stride, tokens, head_dim};
  }
  template <bool IsWhole>
  TokenRows<Value, IsWhole> values() const {
    return {block.values, next.values, block.stride, tokens, head_dim};
  }

 private:
  static std::int64_t after(const Segment& segment, std::int64_t token) {
    return token + kBlockTokens < segment.walk.task.tokens() ? token + kBlockTokens : token;
  }
};

// The keys of the block at token `first`, as those of token `slot` of the store; the scales of both stay at `first`.
template <class Block>
void load_keys(const Segment& segment, int first, int slot, const SegmentStore& out) {
  const BlockView<Block> view(segment, first);
  if (view.is_whole(out.depth)) {
    convert_keys(view.template keys<true>(), out.key(slot, 0), out.depth);
  } else {
    convert_keys(view.template keys<false>(), out.key(slot, 0), out.depth);
  }
  if constexpr (Block::kHasScales) {
    std::copy_n(view.block.key_scales, kBlockTokens, out.key_scales + first);
    std::copy_n(view.block.value_scales, kBlockTokens, out.value_scales + first);
  }
}

template <class Block>
void load_values(const Segment& segment, int first, int slot, const SegmentStore& out) {
  const BlockView<Block> view(segment, first);
  if (view.is_whole(out.depth)) {
    convert_values(view.template values<true>(), out.value_pair(slot, 0), out.depth);
  } else {
    convert_values(view.template values<false>(), out.value_pair(slot, 0), out.depth);
  }
}

}  // namespace edgellm::EDGELLM_ISA

// Attention over int8 KV on AMX tiles, which multiply the stored bytes: sums are exact in int32. Keys are used where
// they lie. Queries are rounded to 15 bits per vector and cut into two int8 parts; weights, times their values' scales,
// to 16 bits per vector and segment, in two unsigned parts. Both roundings depend only on what the vector itself sees.
#include <limits>

#include "attend_few_int8_amx.hpp"
#include "attend_few_pieces.hpp"
#include "attend_int8_parts.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

std::int64_t whole_tiles(std::int64_t head_dim) {
  return (head_dim + kTileChannels - 1) / kTileChannels * kTileChannels;
}

__mmask64 first_bytes(std::int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

// Scratch memory of one segment and sixteen vectors.
struct Int8Memory {
  alignas(64) std::int32_t high[kSegmentTokens][kTileVectors];  // scores' parts; then, as float, the scores
  std::int32_t low[kSegmentTokens][kTileVectors];
  std::uint8_t weights[2][kTileVectors][kSegmentTokens];  // high and low parts; of four tokens, the inner two swapped
  std::int32_t sums[4][2][kTileVectors][kTileVectors];    // of 64 channels: [channel tile][high, low][vector]
  float key_scales[kSegmentTokens];                       // zero where there is no token
  float value_scales[kSegmentTokens];
  float query_scales[kAttendVectors];
};

class Int8TileKernel {
 public:
  // Bytes are finite.
  static bool must_part_rows(const Walk&) { return false; }

  Int8TileKernel(const Walk& walk, float* scratch)
      : depth_(whole_tiles(walk.head_dim())),
        memory_(*reinterpret_cast<Int8Memory*>(scratch)),
        queries_(reinterpret_cast<std::int8_t*>(&memory_ + 1)),
        values_(queries_ + 2 * kAttendVectors * depth_),
        keys_(values_ + kSegmentTokens * depth_) {
    for (int v = 0; v < walk.vectors(); v += kTileVectors) load_queries(walk, v);
  }

  void run(const Segment& segment, const Results& results, Ahead& ahead) {
    for (int t = 0; t < segment.tokens(); t += kBlockTokens) load_block(segment, t, ahead);
    int v = segment.first_seeing_vector() / kTileVectors * kTileVectors;
    for (; v < segment.walk.vectors(); v += kTileVectors) {
      const View view(segment, v);
      score(segment, v, view.any, ahead);
      const __m512 limits = soften(segment, view, v, results);
      weigh(segment, v, view.any, limits, results);
    }
  }

 private:
  // queries_ [vectors / 16][depth / 64][high, low]: tiles of [16 channel quads][16 vectors][4].
  void load_queries(const Walk& walk, int first) {
    const int count = std::min(walk.vectors() - first, kTileVectors);
    QuerySteps steps[kTileVectors];
    for (int i = 0; i < count; ++i) steps[i] = QuerySteps(walk.query(first + i), walk.head_dim());
    for (int i = 0; i < kTileVectors; ++i) memory_.query_scales[first + i] = steps[i].scale;
    for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
      I32 high[kTileVectors] = {};
      I32 low[kTileVectors] = {};
      for (int i = 0; i < count; ++i) {
        steps[i].round(walk.query(first + i) + d, static_cast<int>(walk.head_dim() - d), high[i], low[i]);
      }
      transpose(high);
      transpose(low);
      for (int i = 0; i < kTileVectors; ++i) {
        _mm512_storeu_si512(query_tile(first, d, 0) + i * kTileRowBytes, high[i].v);
        _mm512_storeu_si512(query_tile(first, d, 1) + i * kTileRowBytes, low[i].v);
      }
    }
  }

  std::int8_t* query_tile(int first, std::int64_t d, int part) const {
    return queries_ + (first * depth_ + d * kTileVectors) * 2 + part * kTileBytes;
  }

  void load_block(const Segment& segment, int first, Ahead& ahead) {
    const int tokens = std::min(segment.tokens() - first, static_cast<int>(kBlockTokens));
    const std::uint8_t* data = segment.walk.block(segment.first + first);
    const HeadRows<std::int8_t> rows(segment.walk, data);
    const auto* scales = reinterpret_cast<const std::uint16_t*>(data + 2 * kBlockTokens * rows.stride);
    load_scales(segment.walk, scales, tokens, memory_.key_scales + first);
    load_scales(segment.walk, scales + kBlockTokens * segment.walk.args.kv.kv_heads, tokens,
                memory_.value_scales + first);
    for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
      const __mmask64 mask = first_bytes(segment.walk.head_dim() - d);
      for (int t = 0; t < kBlockTokens; t += 4) {
        ahead.lines(4);
        interleave_quad(rows.values + t * rows.stride + d, rows.stride, mask, value_quad(first + t, d));
      }
    }
    if (segment.walk.head_dim() != depth_) copy_keys(rows, segment.walk.head_dim(), first);
  }

  static void load_scales(const Walk& walk, const std::uint16_t* scales, int tokens, float* out) {
    alignas(64) std::uint16_t bits[kBlockTokens] = {};
    for (int t = 0; t < tokens; ++t) bits[t] = scales[t * walk.args.kv.kv_heads + walk.kv_head];
    store(out, load_f16(bits));
    store(out + kLanes, load_f16(bits + kLanes));
  }

  // Four tokens' values of 64 channels, into the same row of four tiles: each holds channels 4j to 4j + 3 of every 16.
  static void interleave_quad(const std::int8_t* rows, std::int64_t stride, __mmask64 mask, std::int8_t* out) {
    const __m512i t0 = _mm512_maskz_loadu_epi8(mask, rows);
    const __m512i t1 = _mm512_maskz_loadu_epi8(mask, rows + stride);
    const __m512i t2 = _mm512_maskz_loadu_epi8(mask, rows + 2 * stride);
    const __m512i t3 = _mm512_maskz_loadu_epi8(mask, rows + 3 * stride);
    const __m512i even_low = _mm512_unpacklo_epi8(t0, t2);
    const __m512i even_high = _mm512_unpackhi_epi8(t0, t2);
    const __m512i odd_low = _mm512_unpacklo_epi8(t1, t3);
    const __m512i odd_high = _mm512_unpackhi_epi8(t1, t3);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi16(even_low, odd_low));
    _mm512_storeu_si512(out + kTileBytes, _mm512_unpackhi_epi16(even_low, odd_low));
    _mm512_storeu_si512(out + 2 * kTileBytes, _mm512_unpacklo_epi16(even_high, odd_high));
    _mm512_storeu_si512(out + 3 * kTileBytes, _mm512_unpackhi_epi16(even_high, odd_high));
  }

  // values_ [kSegmentTokens / 64][depth / 64][4]: tiles of [16 token quads][16 channels][4].
  std::int8_t* value_quad(int token, std::int64_t d) const {
    return values_ + token / 64 * 64 * depth_ + d * 64 + token % 64 / 4 * kTileRowBytes;
  }

  // keys_ [kSegmentTokens, depth], where channels must be padded.
  void copy_keys(const HeadRows<std::int8_t>& rows, std::int64_t head_dim, int first) {
    for (int t = 0; t < kBlockTokens; ++t) {
      for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
        const __m512i key = _mm512_maskz_loadu_epi8(first_bytes(head_dim - d), rows.keys + t * rows.stride + d);
        _mm512_storeu_si512(keys_ + (first + t) * depth_ + d, key);
      }
    }
  }

  // Parts of the scores of sixteen vectors, 32 tokens at a time. Those of tokens that do not exist are anything.
  void score(const Segment& segment, int first, int tokens, Ahead& ahead) {
    for (int t = 0; t < tokens; t += kBlockTokens) {
      const HeadRows<std::int8_t> rows(segment.walk, segment.walk.block(segment.first + t));
      const bool is_copied = segment.walk.head_dim() != depth_;
      const std::int8_t* keys = is_copied ? keys_ + t * depth_ : rows.keys;
      const std::int64_t stride = is_copied ? depth_ : rows.stride;
      zero_four();
      for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
        _tile_loadd(4, query_tile(first, d, 0), kTileRowBytes);
        _tile_loadd(5, query_tile(first, d, 1), kTileRowBytes);
        _tile_loadd(6, keys + d, stride);
        _tile_loadd(7, keys + kTileHeight * stride + d, stride);
        ahead.lines(kBlockTokens);
        _tile_dpbssd(0, 6, 4);
        _tile_dpbssd(1, 6, 5);
        _tile_dpbssd(2, 7, 4);
        _tile_dpbssd(3, 7, 5);
      }
      store_four(memory_.high[t], memory_.low[t], memory_.high[t + kTileHeight], memory_.low[t + kTileHeight],
                 kTileRowBytes);
    }
  }

  // Scores to the parts of weights, and each vector's largest score and total. Returns what a weight of kWeightSteps
  // stands for.
  __m512 soften(const Segment& segment, const View& view, int first, const Results& results) {
    const __m512 largest = largest_scores(view);
    const __m512 units = mul(load(memory_.query_scales + first), set1(segment.walk.args.scale)).v;
    const __m512 scale = _mm512_mul_ps(units, _mm512_set1_ps(kLog2E));
    const __m512 limits = largest_value_scales(view);
    const Softening softening{scale, _mm512_mul_ps(largest, scale),
                              _mm512_div_ps(_mm512_set1_ps(kWeightSteps), limits)};
    __m512 totals[4] = {};
    int t = 0;
    for (; t + 64 <= view.every; t += 64) {
      soften_64(t, softening, totals, [](int) { return static_cast<__mmask16>(0xffff); });
    }
    for (; t < view.any; t += 64) {
      soften_64(t, softening, totals, [&](int token) { return view.sees(token); });
    }
    alignas(64) float lanes[2][kTileVectors];
    _mm512_store_ps(lanes[0], _mm512_mul_ps(largest, units));
    _mm512_store_ps(lanes[1], _mm512_add_ps(_mm512_add_ps(totals[0], totals[1]), _mm512_add_ps(totals[2], totals[3])));
    for (int i = 0; i < kTileVectors && first + i < segment.walk.vectors(); ++i) {
      results.largest(first + i) = lanes[0][i];
      results.total(first + i) = lanes[1][i];
    }
    return limits;
  }

  __m512 largest_scores(const View& view) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 even = none;
    __m512 odd = none;
    int t = 0;
    for (; t + 2 <= view.every; t += 2) {
      even = _mm512_max_ps(even, joined_score(t));
      odd = _mm512_max_ps(odd, joined_score(t + 1));
    }
    for (; t < view.any; ++t) even = _mm512_mask_max_ps(even, view.sees(t), even, joined_score(t));
    return _mm512_max_ps(even, odd);
  }

  // In units of the vector's query scale; kept in the place of its high part.
  __m512 joined_score(int token) {
    const __m512 whole =
        join_parts(_mm512_loadu_si512(memory_.high[token]), _mm512_loadu_si512(memory_.low[token]), kInt16Base);
    const __m512 score = _mm512_mul_ps(whole, _mm512_set1_ps(memory_.key_scales[token]));
    _mm512_storeu_ps(memory_.high[token], score);
    return score;
  }

  // Of the tokens that each vector sees. Compared as bits, so that a scale that is not a number is the largest.
  __m512 largest_value_scales(const View& view) const {
    __m512i largest = _mm512_setzero_si512();
    int t = 0;
    for (; t + kLanes <= view.every; t += kLanes) {
      largest = _mm512_max_epi32(largest, _mm512_loadu_si512(memory_.value_scales + t));
    }
    __m512i each = _mm512_set1_epi32(_mm512_reduce_max_epi32(largest));
    for (; t < view.any; ++t) {
      const __m512i scale = _mm512_castps_si512(_mm512_set1_ps(memory_.value_scales[t]));
      each = _mm512_mask_max_epi32(each, view.sees(t), each, scale);
    }
    return _mm512_castsi512_ps(each);
  }

  // A weight is 2^(score * scale - shift), and has `steps` steps.
  struct Softening {
    __m512 scale, shift, steps;
  };

  // 64 tokens' weights; mask(token) are the vectors that see it.
  template <class Mask>
  void soften_64(int first, const Softening& softening, __m512 (&totals)[4], const Mask& mask) {
    I32 high[16];
    I32 low[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __m512i steps[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int t = first + 4 * i + j;
        const __m512 score = _mm512_loadu_ps(memory_.high[t]);
        const __m512 weight = exp2_masked(mask(t), _mm512_fmsub_ps(score, softening.scale, softening.shift));
        totals[j] = _mm512_add_ps(totals[j], weight);
        const __m512 scaled = _mm512_maskz_mul_ps(mask(t), weight, _mm512_set1_ps(memory_.value_scales[t]));
        steps[j] = _mm512_maskz_cvtps_epi32(mask(t), _mm512_mul_ps(scaled, softening.steps));
      }
      const __m512i bytes = _mm512_set1_epi32(0x00ff00ff);
      const __mmask32 odd = 0xaaaaaaaa;  // what is no number has its highest bit set, and leaves no trace
      const __m512i front = _mm512_mask_blend_epi16(odd, steps[0], _mm512_slli_epi32(steps[1], 16));
      const __m512i back = _mm512_mask_blend_epi16(odd, steps[2], _mm512_slli_epi32(steps[3], 16));
      low[i].v = _mm512_or_si512(_mm512_and_si512(front, bytes), _mm512_slli_epi32(_mm512_and_si512(back, bytes), 8));
      high[i].v =
          _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(front, 8), bytes), _mm512_andnot_si512(bytes, back));
    }
    transpose(high);
    transpose(low);
    for (int i = 0; i < kTileVectors; ++i) {
      _mm512_storeu_si512(memory_.weights[0][i] + first, high[i].v);
      _mm512_storeu_si512(memory_.weights[1][i] + first, low[i].v);
    }
  }

  // Weights times values of sixteen vectors, 64 channels at a time.
  void weigh(const Segment& segment, int first, int tokens, __m512 limits, const Results& results) {
    alignas(64) float units[kTileVectors];
    _mm512_store_ps(units, _mm512_mul_ps(limits, _mm512_set1_ps(1.0F / kWeightSteps)));
    const int count = std::min(segment.walk.vectors() - first, kTileVectors);
    for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
      weigh_two_tiles(tokens, d, 0);
      weigh_two_tiles(tokens, d, 2);
      for (int i = 0; i < count; ++i) write_sums(i, units[i], d, results.values(first + i), results.head_dim);
    }
  }

  void weigh_two_tiles(int tokens, std::int64_t d, int tile) {
    zero_four();
    for (int t = 0; t < tokens; t += 64) {
      const std::int8_t* values = value_quad(t, d) + tile * kTileBytes;
      _tile_loadd(4, memory_.weights[0][0] + t, kSegmentTokens);
      _tile_loadd(5, memory_.weights[1][0] + t, kSegmentTokens);
      _tile_loadd(6, values, kTileRowBytes);
      _tile_loadd(7, values + kTileBytes, kTileRowBytes);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 5, 6);
      _tile_dpbusd(2, 4, 7);
      _tile_dpbusd(3, 5, 7);
    }
    store_four(memory_.sums[tile][0], memory_.sums[tile][1], memory_.sums[tile + 1][0], memory_.sums[tile + 1][1],
               kTileRowBytes);
  }

  // 64 channels of one vector: tile j has channels 4j to 4j + 3 of every 16.
  void write_sums(int vector, float unit, std::int64_t d, float* out, std::int64_t head_dim) const {
    __m512 channels[4];
    for (int j = 0; j < 4; ++j) {
      const __m512i high = _mm512_loadu_si512(memory_.sums[j][0][vector]);
      const __m512i low = _mm512_loadu_si512(memory_.sums[j][1][vector]);
      channels[j] = _mm512_mul_ps(join_parts(high, low, 256.0F), _mm512_set1_ps(unit));
    }
    order_channels(channels);
    for (int i = 0; i < 4 && d + i * kLanes < padded_head(head_dim); ++i) {
      _mm512_storeu_ps(out + d + i * kLanes, channels[i]);
    }
  }

  WholeTiles tiles_;
  std::int64_t depth_;  // head_dim, up to whole tiles
  Int8Memory& memory_;
  std::int8_t* queries_;
  std::int8_t* values_;
  std::int8_t* keys_;
};

}  // namespace

void attend_int8(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* memory) {
  attend_few_or_many<FewInt8Kernel, Int8TileKernel>(args, begin, end, memory, [](const PieceHeads& piece) {
    return piece.walk.vectors() <= FewInt8Kernel<1>::kMostVectors && piece.walk.head_dim() % kTileChannels == 0;
  });
}

}  // namespace edgellm::EDGELLM_ISA

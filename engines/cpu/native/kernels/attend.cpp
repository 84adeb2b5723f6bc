// Attention in float32: keys are turned so that sixteen tokens' scores lie in lanes, and every loaded key and value
// serves up to four vectors.
#include <limits>

#include "attend_block.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline constexpr int kWideChunks = kTilePanels > 1 ? 4 : 1;  // 16-channel chunks whose sums stay in registers

template <class Block>
class FloatKernel {
 public:
  // Only visible tokens are ever touched.
  static bool must_part_rows(const Walk&) { return false; }

  FloatKernel(const Walk& walk, float* scratch)
      : width_((walk.head_dim() + kLanes - 1) / kLanes * kLanes),
        keys_(scratch),
        values_(keys_ + kBlockTokens * width_),
        queries_(values_ + kBlockTokens * width_),
        weights_(queries_ + kAttendVectors * width_) {
    const F32 scale = set1(walk.args.scale);
    for (int v = 0; v < walk.vectors(); ++v) {
      for (std::int64_t d = 0; d < width_; d += kLanes) {
        const int n = static_cast<int>(walk.head_dim() - d);
        store(queries_ + v * width_ + d, mul(load_n(walk.query(v) + d, n), scale));
      }
    }
  }

  void run(const Segment& segment, const Results& results, Ahead&) {
    const int first = segment.first_seeing_vector();
    for (int t = 0; t < segment.tokens(); t += kBlockTokens) {
      load_keys(segment, t);
      each_four(first, segment.walk.vectors(), [&]<int Vectors>(int v) { score<Vectors>(segment, v, t); });
    }
    for (int v = first; v < segment.walk.vectors(); ++v) soften(segment, v, results);
    for (int t = 0; t < segment.tokens(); t += kBlockTokens) {
      load_values(segment, t);
      each_four(first, segment.walk.vectors(), [&]<int Vectors>(int v) { add<Vectors>(segment, v, t, results); });
    }
  }

 private:
  // body<Vectors>(v) for all vectors from `first` on, four at a time as long as there are four.
  template <class Body>
  static void each_four(int first, int vectors, const Body& body) {
    int v = first;
    for (; v + 4 <= vectors; v += 4) body.template operator()<4>(v);
    if (vectors - v == 3) body.template operator()<3>(v);
    if (vectors - v == 2) body.template operator()<2>(v);
    if (vectors - v == 1) body.template operator()<1>(v);
  }

  float* weights(int v, int t) const { return weights_ + v * kSegmentTokens + t; }

  static int block_tokens(const Segment& segment, int t) {
    return std::min(segment.tokens() - t, static_cast<int>(kBlockTokens));
  }

  // keys_ [width, 32]: channel by channel, the block's tokens in lanes.
  void load_keys(const Segment& segment, int first) {
    constexpr std::int64_t word_values = 4 / sizeof(typename Block::Value);
    const int tokens = block_tokens(segment, first);
    const Block block(segment.walk, segment.walk.block(segment.first + first), tokens);
    const std::int64_t dim = segment.walk.head_dim();
    for (int t = 0; t < tokens; t += kLanes) {
      for (std::int64_t d = 0; d < dim; d += kLanes * word_values) {
        I32 words[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int n = t + i < tokens ? static_cast<int>((dim - d) / word_values) : 0;
          words[i] = load_words_n(block.keys + (t + i) * block.stride + d, n);
        }
        transpose(words);
        for (std::int64_t w = 0; w < kLanes && d + w * word_values < dim; ++w) {
          block.spread_keys(words[w], t, keys_ + (d + w * word_values) * kBlockTokens + t);
        }
      }
    }
  }

  // values_ [32, width].
  void load_values(const Segment& segment, int first) {
    const int tokens = block_tokens(segment, first);
    const Block block(segment.walk, segment.walk.block(segment.first + first), tokens);
    for (int t = 0; t < tokens; ++t) {
      for (std::int64_t d = 0; d < segment.walk.head_dim(); d += kLanes) {
        const int n = static_cast<int>(segment.walk.head_dim() - d);
        store(values_ + t * width_ + d, block.value_lanes(t, d, n));
      }
    }
  }

  // Scores of the block's tokens; every token's sum runs over the channels in order.
  template <int Vectors>
  void score(const Segment& segment, int v, int first) {
    F32 low[Vectors];
    F32 high[Vectors];
    for (int i = 0; i < Vectors; ++i) low[i] = high[i] = zero();
    for (std::int64_t d = 0; d < segment.walk.head_dim(); ++d) {
      const F32 key_low = load(keys_ + d * kBlockTokens);
      const F32 key_high = load(keys_ + d * kBlockTokens + kLanes);
      for (int i = 0; i < Vectors; ++i) {
        const F32 q = set1(queries_[(v + i) * width_ + d]);
        low[i] = fma(q, key_low, low[i]);
        high[i] = fma(q, key_high, high[i]);
      }
    }
    for (int i = 0; i < Vectors; ++i) {
      store(weights(v + i, first), low[i]);
      store(weights(v + i, first) + kLanes, high[i]);
    }
  }

  // Scores to weights, with zeros for tokens that the vector does not see.
  void soften(const Segment& segment, int v, const Results& results) {
    const int visible = std::min(segment.visible(v), segment.tokens());
    const F32 none = set1(-std::numeric_limits<float>::infinity());
    F32 largest = none;
    for (int t = 0; t < visible; t += kLanes) {
      largest = max(largest, first_lanes(load(weights(v, t)), none, visible - t));
    }
    const float peak = reduce_max(largest);
    F32 total = zero();
    for (int t = 0; t < visible; t += kLanes) {
      const F32 weight = first_lanes(exp(sub(load(weights(v, t)), set1(peak))), zero(), visible - t);
      store(weights(v, t), weight);
      total = edgellm::EDGELLM_ISA::add(total, weight);
    }
    results.largest(v) = peak;
    results.total(v) = reduce_add(total);
    for (std::int64_t d = 0; d < width_; d += kLanes) store(results.values(v) + d, zero());
  }

  // The block's weights times its values, tokens in order.
  template <int Vectors>
  void add(const Segment& segment, int v, int first, const Results& results) {
    const int tokens = block_tokens(segment, first);
    const int visible = std::min(segment.visible(v) - first, tokens);
    if (Vectors == 1 || segment.visible(v + Vectors - 1) == segment.visible(v) || visible == tokens) {
      add_alike<Vectors>(v, first, visible, results);
      return;
    }
    for (int i = 0; i < Vectors; ++i) {
      add_alike<1>(v + i, first, std::min(segment.visible(v + i) - first, tokens), results);
    }
  }

  template <int Vectors>
  void add_alike(int v, int first, int visible, const Results& results) {
    std::int64_t d = 0;
    for (; d + kWideChunks * kLanes <= width_; d += kWideChunks * kLanes) {
      add_chunks<Vectors, kWideChunks>(v, first, visible, results, d);
    }
    for (; d < width_; d += kLanes) add_chunks<Vectors, 1>(v, first, visible, results, d);
  }

  template <int Vectors, int Chunks>
  void add_chunks(int v, int first, int visible, const Results& results, std::int64_t d) {
    F32 sum[Vectors][Chunks];
    for (int i = 0; i < Vectors; ++i) {
      for (int c = 0; c < Chunks; ++c) sum[i][c] = load(results.values(v + i) + d + c * kLanes);
    }
    for (int t = 0; t < visible; ++t) {
      for (int c = 0; c < Chunks; ++c) {
        const F32 value = load(values_ + t * width_ + d + c * kLanes);
        for (int i = 0; i < Vectors; ++i) sum[i][c] = fma(set1(*weights(v + i, first + t)), value, sum[i][c]);
      }
    }
    for (int i = 0; i < Vectors; ++i) {
      for (int c = 0; c < Chunks; ++c) store(results.values(v + i) + d + c * kLanes, sum[i][c]);
    }
  }

  std::int64_t width_;  // head_dim, up to whole lanes
  float* keys_;
  float* values_;
  float* queries_;
  float* weights_;  // [vectors, kSegmentTokens]: scores, then weights
};

}  // namespace

void attend_fp16(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch) {
  attend_pieces<FloatKernel<Fp16Block>>(args, begin, end, scratch);
}

void attend_int8(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch) {
  attend_pieces<FloatKernel<Int8Block>>(args, begin, end, scratch);
}

}  // namespace edgellm::EDGELLM_ISA

#include "attend.hpp"

#include <limits>

#include "../half.hpp"
#include "../simd/math.hpp"
#include "../simd/simd.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline constexpr int kWideChunks = kTilePanels == 2 ? 4 : 1;  // 16-channel chunks whose sums stay in registers

std::int64_t padded_dim(const KvLayer& kv) { return (kv.head_dim + kLanes - 1) / kLanes * kLanes; }

// One block of one KV head, widened, and the state of every query vector (row * group + head) that walks the cache.
struct State {
  float* keys;     // [head_dim, 32]
  float* values;   // [32, padded_dim]
  float* queries;  // [vectors, padded_dim], times the softmax scale
  float* sums;     // [vectors, padded_dim]
  float* weights;  // [vectors, 32]
  float* largest;  // [vectors]
  float* totals;   // [vectors]

  State(float* scratch, std::int64_t padded)
      : keys(scratch),
        values(keys + kBlockTokens * padded),
        queries(values + kBlockTokens * padded),
        sums(queries + kAttendVectors * padded),
        weights(sums + kAttendVectors * padded),
        largest(weights + kAttendVectors * kBlockTokens),
        totals(largest + kAttendVectors) {}
};

struct Fp16Cache {
  static void load_block(const KvLayer& kv, std::int64_t block, std::int64_t head, int tokens, State& state) {
    const auto* keys = reinterpret_cast<const std::uint16_t*>(kv.data + block * kv.block_bytes) + head * kv.head_dim;
    const auto* values = keys + kBlockTokens * kv.kv_heads * kv.head_dim;
    const std::int64_t token_values = kv.kv_heads * kv.head_dim;
    for (int t = 0; t < kBlockTokens; t += kLanes) {
      for (std::int64_t d = 0; d < kv.head_dim; d += 2) {
        const I32 pairs = gather_words(keys + t * token_values + d, 2 * token_values, tokens - t);
        store(state.keys + d * kBlockTokens + t, f16_low(pairs));
        store(state.keys + (d + 1) * kBlockTokens + t, f16_high(pairs));
      }
    }
    for (int t = 0; t < tokens; ++t) {
      for (std::int64_t d = 0; d < kv.head_dim; d += kLanes) {
        const int n = static_cast<int>(kv.head_dim - d);
        store(state.values + t * padded_dim(kv) + d, load_f16_n(values + t * token_values + d, n));
      }
    }
  }
};

template <int Byte>
inline F32 signed_byte(I32 words) {
  return to_f32(shift_right_signed<24>(shift_left<24 - 8 * Byte>(words)));
}

struct Int8Cache {
  static void load_block(const KvLayer& kv, std::int64_t block, std::int64_t head, int tokens, State& state) {
    const std::uint8_t* base = kv.data + block * kv.block_bytes;
    const std::int64_t token_values = kv.kv_heads * kv.head_dim;
    const auto* keys = reinterpret_cast<const std::int8_t*>(base) + head * kv.head_dim;
    const auto* values = keys + kBlockTokens * token_values;
    const auto* key_scales = reinterpret_cast<const std::uint16_t*>(base + 2 * kBlockTokens * token_values) + head;
    const auto* value_scales = key_scales + kBlockTokens * kv.kv_heads;
    load_keys(kv, keys, key_scales, tokens, state);
    for (int t = 0; t < tokens; ++t) {
      const F32 scale = set1(fp16_to_float(value_scales[t * kv.kv_heads]));
      for (std::int64_t d = 0; d < kv.head_dim; d += kLanes) {
        const F32 q = load_i8_n(values + t * token_values + d, static_cast<int>(kv.head_dim - d));
        store(state.values + t * padded_dim(kv) + d, mul(q, scale));
      }
    }
  }

  static void load_keys(const KvLayer& kv, const std::int8_t* keys, const std::uint16_t* scales, int tokens,
                        State& state) {
    const std::int64_t token_values = kv.kv_heads * kv.head_dim;
    float lanes[kBlockTokens] = {};
    for (int t = 0; t < tokens; ++t) lanes[t] = fp16_to_float(scales[t * kv.kv_heads]);
    for (int t = 0; t < kBlockTokens; t += kLanes) {
      const F32 scale = load(lanes + t);
      for (std::int64_t d = 0; d < kv.head_dim; d += 4) {
        const I32 words = gather_words(keys + t * token_values + d, token_values, tokens - t);
        float* out = state.keys + d * kBlockTokens + t;
        store(out, mul(signed_byte<0>(words), scale));
        store(out + kBlockTokens, mul(signed_byte<1>(words), scale));
        store(out + 2 * kBlockTokens, mul(signed_byte<2>(words), scale));
        store(out + 3 * kBlockTokens, mul(signed_byte<3>(words), scale));
      }
    }
  }
};

// Row `first_row + v / group`, query head `kv_head * group + v % group`.
struct Walk {
  const AttendArgs& args;
  const AttendTask& task;
  std::int64_t kv_head;

  std::int64_t group() const { return args.num_heads / args.kv.kv_heads; }
  int vectors() const { return static_cast<int>(task.rows * group()); }
  std::int64_t offset(int v, std::int64_t stride) const {
    return (task.first_row + v / group()) * stride + (kv_head * group() + v % group()) * args.kv.head_dim;
  }
  // Tokens of the block that vector v may see; at most 0 when all of them are in its future.
  int visible(int v, std::int64_t first_token) const {
    const std::int64_t count = task.first_position + v / group() + 1 - first_token;
    return static_cast<int>(count < kBlockTokens ? count : kBlockTokens);
  }
};

void start(const Walk& walk, State& state) {
  const std::int64_t padded = padded_dim(walk.args.kv);
  const F32 scale = set1(walk.args.scale);
  for (int v = 0; v < walk.vectors(); ++v) {
    const float* q = walk.args.q.data + walk.offset(v, walk.args.q.stride);
    for (std::int64_t d = 0; d < padded; d += kLanes) {
      store(state.queries + v * padded + d, mul(load_n(q + d, static_cast<int>(walk.args.kv.head_dim - d)), scale));
      store(state.sums + v * padded + d, zero());
    }
    state.largest[v] = -std::numeric_limits<float>::infinity();
    state.totals[v] = 0.0F;
  }
}

// Scores of the block's 32 tokens, left in `weights`; every token's sum runs over the channels in order.
template <int Vectors>
void score(const Walk& walk, State& state, int v) {
  const std::int64_t padded = padded_dim(walk.args.kv);
  F32 low[Vectors];
  F32 high[Vectors];
  for (int i = 0; i < Vectors; ++i) low[i] = high[i] = zero();
  for (std::int64_t d = 0; d < walk.args.kv.head_dim; ++d) {
    const F32 key_low = load(state.keys + d * kBlockTokens);
    const F32 key_high = load(state.keys + d * kBlockTokens + kLanes);
    for (int i = 0; i < Vectors; ++i) {
      const F32 q = set1(state.queries[(v + i) * padded + d]);
      low[i] = fma(q, key_low, low[i]);
      high[i] = fma(q, key_high, high[i]);
    }
  }
  for (int i = 0; i < Vectors; ++i) {
    store(state.weights + (v + i) * kBlockTokens, low[i]);
    store(state.weights + (v + i) * kBlockTokens + kLanes, high[i]);
  }
}

// Scores to weights under the running maximum; returns what the sums so far must be multiplied with.
float soften(State& state, int v, int visible) {
  float* weights = state.weights + v * kBlockTokens;
  const F32 none = set1(-std::numeric_limits<float>::infinity());
  const F32 low = first_lanes(load(weights), none, visible);
  const F32 high = first_lanes(load(weights + kLanes), none, visible - kLanes);
  const float before = state.largest[v];
  const float block_largest = reduce_max(max(low, high));
  const float largest = block_largest > before ? block_largest : before;
  const F32 weight_low = first_lanes(exp(sub(low, set1(largest))), zero(), visible);
  const F32 weight_high = first_lanes(exp(sub(high, set1(largest))), zero(), visible - kLanes);
  store(weights, weight_low);
  store(weights + kLanes, weight_high);
  float correction[kLanes];
  store(correction, exp(set1(before - largest)));
  state.largest[v] = largest;
  state.totals[v] = state.totals[v] * correction[0] + reduce_add(add(weight_low, weight_high));
  return correction[0];
}

// sums = sums * correction + weights . values, tokens in order; only visible tokens are ever touched.
template <int Vectors, int Chunks>
void accumulate_chunks(State& state, int v, const float* correction, int visible, std::int64_t padded, std::int64_t d) {
  F32 sum[Vectors][Chunks];
  for (int i = 0; i < Vectors; ++i) {
    for (int c = 0; c < Chunks; ++c) {
      sum[i][c] = mul(load(state.sums + (v + i) * padded + d + c * kLanes), set1(correction[i]));
    }
  }
  for (int t = 0; t < visible; ++t) {
    for (int c = 0; c < Chunks; ++c) {
      const F32 value = load(state.values + t * padded + d + c * kLanes);
      for (int i = 0; i < Vectors; ++i) {
        sum[i][c] = fma(set1(state.weights[(v + i) * kBlockTokens + t]), value, sum[i][c]);
      }
    }
  }
  for (int i = 0; i < Vectors; ++i) {
    for (int c = 0; c < Chunks; ++c) store(state.sums + (v + i) * padded + d + c * kLanes, sum[i][c]);
  }
}

template <int Vectors>
void accumulate(State& state, int v, const float* correction, int visible, std::int64_t padded) {
  std::int64_t d = 0;
  for (; d + kWideChunks * kLanes <= padded; d += kWideChunks * kLanes) {
    accumulate_chunks<Vectors, kWideChunks>(state, v, correction, visible, padded, d);
  }
  for (; d < padded; d += kLanes) {
    accumulate_chunks<Vectors, 1>(state, v, correction, visible, padded, d);
  }
}

template <int Vectors>
void attend_vectors(const Walk& walk, State& state, int v, std::int64_t first_token) {
  const std::int64_t padded = padded_dim(walk.args.kv);
  score<Vectors>(walk, state, v);
  float correction[Vectors];
  bool alike = true;
  for (int i = 0; i < Vectors; ++i) {
    correction[i] = soften(state, v + i, walk.visible(v + i, first_token));
    alike = alike && walk.visible(v + i, first_token) == walk.visible(v, first_token);
  }
  if (alike) {
    accumulate<Vectors>(state, v, correction, walk.visible(v, first_token), padded);
    return;
  }
  for (int i = 0; i < Vectors; ++i) {
    accumulate<1>(state, v + i, correction + i, walk.visible(v + i, first_token), padded);
  }
}

void attend_block(const Walk& walk, State& state, std::int64_t first_token) {
  int v = 0;
  while (v < walk.vectors() && walk.visible(v, first_token) <= 0) ++v;
  for (; v + 4 <= walk.vectors(); v += 4) attend_vectors<4>(walk, state, v, first_token);
  if (v + 2 <= walk.vectors()) {
    attend_vectors<2>(walk, state, v, first_token);
    v += 2;
  }
  if (v < walk.vectors()) attend_vectors<1>(walk, state, v, first_token);
}

void write_out(const Walk& walk, const State& state) {
  const std::int64_t padded = padded_dim(walk.args.kv);
  for (int v = 0; v < walk.vectors(); ++v) {
    float* out = walk.args.out.data + walk.offset(v, walk.args.out.stride);
    const F32 total = set1(state.totals[v]);
    for (std::int64_t d = 0; d < walk.args.kv.head_dim; d += kLanes) {
      store_n(out + d, div(load(state.sums + v * padded + d), total), static_cast<int>(walk.args.kv.head_dim - d));
    }
  }
}

template <class Cache>
void attend(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch) {
  State state(scratch, padded_dim(args.kv));
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const AttendTask& task = args.tasks[unit / args.kv.kv_heads];
    const Walk walk{args, task, unit % args.kv.kv_heads};
    start(walk, state);
    const std::int64_t tokens = task.first_position + task.rows;
    for (std::int64_t first = 0; first < tokens; first += kBlockTokens) {
      const std::int64_t count = tokens - first < kBlockTokens ? tokens - first : kBlockTokens;
      const std::int64_t block = task.blocks[first / kBlockTokens];
      Cache::load_block(args.kv, block, walk.kv_head, static_cast<int>(count), state);
      attend_block(walk, state, first);
    }
    write_out(walk, state);
  }
}

}  // namespace

void attend_fp16(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch) {
  attend<Fp16Cache>(args, begin, end, scratch);
}

void attend_int8(const AttendArgs& args, std::int64_t begin, std::int64_t end, float* scratch) {
  attend<Int8Cache>(args, begin, end, scratch);
}

}  // namespace edgellm::EDGELLM_ISA

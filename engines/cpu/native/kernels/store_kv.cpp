#include "store_kv.hpp"

#include "../half.hpp"
#include "../simd/simd.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

// Half-split pairs (i, i + pairs) of the first 2 * pairs channels, in place.
void rotate(float* x, const float* rotation, std::int64_t pairs) {
  for (std::int64_t i = 0; i < pairs; i += kLanes) {
    const int n = static_cast<int>(pairs - i);
    const F32 cosine = load_n(rotation + i, n);
    const F32 sine = load_n(rotation + pairs + i, n);
    const F32 first = load_n(x + i, n);
    const F32 second = load_n(x + pairs + i, n);
    store_n(x + i, sub(mul(first, cosine), mul(second, sine)), n);
    store_n(x + pairs + i, add(mul(second, cosine), mul(first, sine)), n);
  }
}

void rotate_heads(float* x, std::int64_t heads, std::int64_t head_dim, const float* rotation, std::int64_t rotary_dim) {
  for (std::int64_t head = 0; rotation != nullptr && head < heads; ++head) {
    rotate(x + head * head_dim, rotation, rotary_dim / 2);
  }
}

const float* rotation_row(const float* table, std::int64_t rotary_dim, std::int64_t position) {
  return table == nullptr ? nullptr : table + position * rotary_dim;
}

// One slot of the cache: token `slot` of the row's block.
struct Slot {
  std::uint8_t* block;
  std::int64_t token;
};

Slot slot_of(const StoreKvArgs& args, std::int64_t row) {
  return {args.kv.data + args.at.block[row] * args.kv.block_bytes, args.at.position[row] % kBlockTokens};
}

struct Fp16Store {
  // `half`: 0 for K, 1 for V.
  static void head(const KvLayer& kv, const Slot& slot, int half, std::int64_t head, const float* x) {
    const std::int64_t index = ((half * kBlockTokens + slot.token) * kv.kv_heads + head) * kv.head_dim;
    auto* out = reinterpret_cast<std::uint16_t*>(slot.block) + index;
    for (std::int64_t i = 0; i < kv.head_dim; i += kLanes) {
      const int n = static_cast<int>(kv.head_dim - i);
      store_f16_n(out + i, load_n(x + i, n), n);
    }
  }
};

struct Int8Store {
  static void head(const KvLayer& kv, const Slot& slot, int half, std::int64_t head, const float* x) {
    const std::int64_t index = (half * kBlockTokens + slot.token) * kv.kv_heads + head;
    const std::int64_t values = 2 * kBlockTokens * kv.kv_heads * kv.head_dim;
    F32 largest = zero();
    for (std::int64_t i = 0; i < kv.head_dim; i += kLanes) {
      largest = max(largest, abs(load_n(x + i, static_cast<int>(kv.head_dim - i))));
    }
    const std::uint16_t scale_bits = float_to_fp16(reduce_max(largest) / 127.0F);
    reinterpret_cast<std::uint16_t*>(slot.block + values)[index] = scale_bits;
    const float scale = fp16_to_float(scale_bits);
    quantize(x, scale > 0.0F ? 1.0F / scale : 0.0F, reinterpret_cast<std::int8_t*>(slot.block) + index * kv.head_dim,
             kv.head_dim);
  }

  static void quantize(const float* x, float inverse, std::int8_t* out, std::int64_t size) {
    for (std::int64_t i = 0; i < size; i += kLanes) {
      const int n = static_cast<int>(size - i);
      const F32 value = mul(load_n(x + i, n), set1(inverse));
      store_i8_n(out + i, to_i32(min(max(value, set1(-127.0F)), set1(127.0F))), n);
    }
  }
};

template <class Store>
void store_row(const StoreKvArgs& args, std::int64_t row) {
  const std::int64_t position = args.at.position[row];
  const std::int64_t dim = args.kv.head_dim;
  const Slot slot = slot_of(args, row);
  float* q = args.q.data + row * args.q.stride;
  float* k = args.k.data + row * args.k.stride;
  rotate_heads(q, args.num_heads, dim, rotation_row(args.q_rotation, args.q_rotary_dim, position), args.q_rotary_dim);
  rotate_heads(k, args.kv.kv_heads, dim, rotation_row(args.k_rotation, args.k_rotary_dim, position), args.k_rotary_dim);
  for (std::int64_t head = 0; head < args.kv.kv_heads; ++head) {
    Store::head(args.kv, slot, 0, head, k + head * dim);
    Store::head(args.kv, slot, 1, head, args.v.data + row * args.v.stride + head * dim);
  }
}

}  // namespace

void store_kv_fp16(const StoreKvArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    store_row<Fp16Store>(args, row);
  }
}

void store_kv_int8(const StoreKvArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    store_row<Int8Store>(args, row);
  }
}

}  // namespace edgellm::EDGELLM_ISA

#include <cmath>

#include "../half.hpp"
#include "store_kv.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

void rotate(float* x, const float* table, std::int64_t rotary_dim, std::int64_t position) {
  const std::int64_t pairs = rotary_dim / 2;
  for (std::int64_t i = 0; table != nullptr && i < pairs; ++i) {
    const double cosine = table[position * rotary_dim + i];
    const double sine = table[position * rotary_dim + pairs + i];
    const double first = x[i];
    const double second = x[pairs + i];
    x[i] = static_cast<float>(first * cosine - second * sine);
    x[pairs + i] = static_cast<float>(second * cosine + first * sine);
  }
}

// Index of (K or V, token slot, head) among the vectors of a block.
std::int64_t vector_index(const StoreKvArgs& args, std::int64_t row, int half, std::int64_t head) {
  const std::int64_t slot = half * kBlockTokens + args.at.position[row] % kBlockTokens;
  return slot * args.kv.kv_heads + head;
}

struct Fp16Store {
  static void vector(const StoreKvArgs& args, std::uint8_t* block, std::int64_t index, const float* x) {
    auto* out = reinterpret_cast<std::uint16_t*>(block) + index * args.kv.head_dim;
    for (std::int64_t d = 0; d < args.kv.head_dim; ++d) out[d] = float_to_fp16(x[d]);
  }
};

struct Int8Store {
  static void vector(const StoreKvArgs& args, std::uint8_t* block, std::int64_t index, const float* x) {
    float largest = 0.0F;
    for (std::int64_t d = 0; d < args.kv.head_dim; ++d) largest = std::fmax(largest, std::fabs(x[d]));
    const std::uint16_t scale_bits = float_to_fp16(largest / 127.0F);
    const float scale = fp16_to_float(scale_bits);
    auto* out = reinterpret_cast<std::int8_t*>(block) + index * args.kv.head_dim;
    for (std::int64_t d = 0; d < args.kv.head_dim; ++d) {
      const float q = scale > 0.0F ? std::nearbyint(x[d] * (1.0F / scale)) : 0.0F;
      out[d] = static_cast<std::int8_t>(std::fmin(std::fmax(q, -127.0F), 127.0F));
    }
    const std::int64_t values = 2 * kBlockTokens * args.kv.kv_heads * args.kv.head_dim;
    reinterpret_cast<std::uint16_t*>(block + values)[index] = scale_bits;
  }
};

template <class Store>
void store_row(const StoreKvArgs& args, std::int64_t row) {
  const std::int64_t dim = args.kv.head_dim;
  std::uint8_t* block = args.kv.data + args.at.block[row] * args.kv.block_bytes;
  for (std::int64_t head = 0; head < args.num_heads; ++head) {
    float* q = args.q.data + row * args.q.stride + head * dim;
    rotate(q, args.q_rotation, args.q_rotary_dim, args.at.position[row]);
  }
  for (std::int64_t head = 0; head < args.kv.kv_heads; ++head) {
    float* k = args.k.data + row * args.k.stride + head * dim;
    rotate(k, args.k_rotation, args.k_rotary_dim, args.at.position[row]);
    Store::vector(args, block, vector_index(args, row, 0, head), k);
    Store::vector(args, block, vector_index(args, row, 1, head), args.v.data + row * args.v.stride + head * dim);
  }
}

}  // namespace

void store_kv_fp16(const StoreKvArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) store_row<Fp16Store>(args, row);
}

void store_kv_int8(const StoreKvArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) store_row<Int8Store>(args, row);
}

}  // namespace edgellm::EDGELLM_ISA

// The memory that kernels share: rows of floats, records of prepared inputs, the paged cache.
//
// Arguments of kernels are plain structs. A kernel works on the half-open range [begin, end) of its unit of work, so
// that any split of the units over threads gives the same bits. Shapes are in brackets; a stride is in elements.
#pragma once

#include <cstdint>

namespace edgellm {

inline constexpr std::int64_t kPanelColumns = 16;
inline constexpr std::int64_t kBlockTokens = 32;
inline constexpr std::int32_t kInt16Base = 128;  // of the two parts of an int16 input

// float32 [rows, width], rows `stride` floats apart.
struct Rows {
  float* data;
  std::int64_t stride;
};

// A linear's input after conversion: bytes [rows, row_bytes], each row holding
//   channels   HalfIn, float or int8 [padded_channels] at 0; int16 as int8 [2][padded_channels], high and low parts:
//              high * 128 + low, low in [-64, 63]
//   sums       int32 [groups] at sums_at: sum of the int8 channels of each group; of int16, of its two parts
//   outliers   HalfIn [padded_outliers] at outliers_at
//   scale      float at scale_at
// On AMX, half-precision channels lie in tiles instead; see amx_half.hpp.
struct Records {
  std::uint8_t* data;
  std::int64_t row_bytes;
  std::int64_t sums_at, outliers_at, scale_at;
};

// Where the rows of a step live in the paged cache.
struct Placement {
  const std::int32_t* position;  // [rows]
  const std::int32_t* block;     // [rows]: pool block that holds the row's position
};

// Paged KV of one layer: blocks of `block_tokens` tokens, K [tokens, kv_heads, head_dim] then V, then int8's scales.
struct KvLayer {
  std::uint8_t* data;
  std::int64_t block_bytes;
  std::int64_t kv_heads, head_dim;
};

}  // namespace edgellm

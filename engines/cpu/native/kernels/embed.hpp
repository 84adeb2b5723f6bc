#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// Unit: row. out[r] = table[tokens[r]].
struct EmbedArgs {
  const std::int32_t* tokens;  // [rows]
  const std::uint8_t* table;   // packed [vocab/16][padded_channels/2][16][2] bf16 or [vocab/16][.../4][16][4] u8
  const float* scale;          // [vocab], for int8
  std::int64_t channels, padded_channels;
  Rows out;
};

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

void embed_half(const EmbedArgs& args, std::int64_t begin, std::int64_t end);
void embed_int8(const EmbedArgs& args, std::int64_t begin, std::int64_t end);

}  // namespace edgellm::EDGELLM_ISA
#endif

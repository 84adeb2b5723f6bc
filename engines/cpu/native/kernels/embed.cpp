#include "embed.hpp"

#include "../half.hpp"
#include "../simd/simd.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

// The token's column inside its panel; lines of `Channels` channels lie kLineBytes apart.
template <int Channels>
const std::uint8_t* token_column(const EmbedArgs& args, std::int64_t row) {
  const std::int64_t token = args.tokens[row];
  const std::int64_t panel_bytes = args.padded_channels / Channels * kLineBytes;
  return args.table + token / kPanelColumns * panel_bytes + token % kPanelColumns * (kLineBytes / kPanelColumns);
}

}  // namespace

void embed_half(const EmbedArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::uint8_t* column = token_column<2>(args, row);
    float* out = args.out.data + row * args.out.stride;
    for (std::int64_t k = 0; k < args.channels; ++k) {
      std::uint16_t bits;
      std::memcpy(&bits, column + k / 2 * kLineBytes + k % 2 * 2, sizeof(bits));
      out[k] = bf16_to_float(bits);
    }
  }
}

void embed_int8(const EmbedArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::uint8_t* column = token_column<4>(args, row);
    const float scale = args.scale[args.tokens[row]];
    float* out = args.out.data + row * args.out.stride;
    for (std::int64_t k = 0; k < args.channels; ++k) {
      out[k] = static_cast<float>(column[k / 4 * kLineBytes + k % 4] - 128) * scale;
    }
  }
}

}  // namespace edgellm::EDGELLM_ISA

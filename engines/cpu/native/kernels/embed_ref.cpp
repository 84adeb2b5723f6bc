#include <cstring>

#include "../half.hpp"
#include "embed.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

// Where channel k of a token lies in [vocab/16][padded/Channels][16][Channels].
template <int Channels>
std::int64_t packed_index(const EmbedArgs& args, std::int64_t token, std::int64_t k) {
  const std::int64_t line = token / kPanelColumns * (args.padded_channels / Channels) + k / Channels;
  return (line * kPanelColumns + token % kPanelColumns) * Channels + k % Channels;
}

}  // namespace

void embed_half(const EmbedArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t k = 0; k < args.channels; ++k) {
      std::uint16_t bits;
      std::memcpy(&bits, args.table + 2 * packed_index<2>(args, args.tokens[row], k), sizeof(bits));
      args.out.data[row * args.out.stride + k] = bf16_to_float(bits);
    }
  }
}

void embed_int8(const EmbedArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t k = 0; k < args.channels; ++k) {
      const int q = args.table[packed_index<4>(args, args.tokens[row], k)] - 128;
      args.out.data[row * args.out.stride + k] = static_cast<float>(q) * args.scale[args.tokens[row]];
    }
  }
}

}  // namespace edgellm::EDGELLM_ISA

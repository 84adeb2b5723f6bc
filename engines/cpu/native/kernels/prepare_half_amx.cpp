// prepare_half into tiles; see amx_half.hpp.
#include "../simd/simd.hpp"
#include "amx_half.hpp"
#include "prepare.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

F32 scaled(const PrepareArgs& args, const float* x, std::int64_t k) {
  const int n = static_cast<int>(args.channels - k);
  const F32 value = load_n(x + k, n);
  return args.input_scale != nullptr ? mul(value, load_n(args.input_scale + k, n)) : value;
}

}  // namespace

void prepare_half_tiles(const PrepareArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t first = row / kTileHeight * kTileHeight;
    const HalfTiles tiles(args.out, first, args.rows, args.padded_channels);
    const float* x = args.x.data + row * args.x.stride;
    for (std::int64_t k = 0; k < args.padded_channels; k += kTileChannels) {
      auto* line = reinterpret_cast<HalfIn*>(tiles.line(k / kTileChannels, row - first));
      store_half_n(line, scaled(args, x, k), kLanes);
      store_half_n(line + kLanes, scaled(args, x, k + kLanes), kLanes);
    }
  }
}

}  // namespace edgellm::EDGELLM_ISA

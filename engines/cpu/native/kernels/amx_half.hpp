// A prepared half-precision input as AMX reads it: tile after tile, so that a load reads one stretch of memory. Sixteen
// rows at a time: bf16 [channels / 32][rows of these sixteen that exist][32].
#pragma once

#include <algorithm>

#include "amx_tile.hpp"
#include "rows.hpp"

namespace edgellm::EDGELLM_ISA {

inline constexpr std::int64_t kTileChannels = 32;

// Of the sixteen rows from `row` on, a multiple of 16.
struct HalfTiles {
  std::uint8_t* data;
  std::int64_t height;

  HalfTiles(const Records& x, std::int64_t row, std::int64_t rows, std::int64_t channels)
      : data(x.data + row * channels * 2), height(std::min<std::int64_t>(kTileHeight, rows - row)) {}
  std::int64_t tile_bytes() const { return height * kTileRowBytes; }
  std::uint8_t* line(std::int64_t step, std::int64_t r) const { return data + step * tile_bytes() + r * kTileRowBytes; }
};

}  // namespace edgellm::EDGELLM_ISA

// Two tiles of activations times two panels of weights, for int8 and bf16: a step is 64 bytes of each row, and 1 KiB of
// each panel as it lies in memory.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "amx_tile.hpp"
#include "linear_tile.hpp"

namespace edgellm::EDGELLM_ISA {

struct TileSums {
  alignas(64) float of[4][kTileHeight * kPanelColumns];  // or int32; [2 * i + j]: activations i times panel j

  float* row(int i, int j, int r) { return of[2 * i + j] + r * kPanelColumns; }
};

struct TileOperands {
  const std::uint8_t* x[2];
  const std::uint8_t* weight[2];
  std::int64_t row_bytes, steps;
};

// Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
inline void configure_product(int first_height, int second_height) {
  TileConfig config;
  for (const int tile : {0, 1, 4}) config.set(tile, first_height);
  for (const int tile : {2, 3, 5}) config.set(tile, second_height);
  for (const int tile : {6, 7}) config.set(tile, kTileHeight);
  load_config(config);
}

// sums += x . weight, or = where they start. Product::run() is the four tile products.
template <class Product>
void multiply(const TileOperands& operands, bool starts, TileSums& sums) {
  if (starts) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums.of[0], kLineBytes);
    _tile_loadd(1, sums.of[1], kLineBytes);
    _tile_loadd(2, sums.of[2], kLineBytes);
    _tile_loadd(3, sums.of[3], kLineBytes);
  }
  for (std::int64_t step = 0; step < operands.steps; ++step) {
    _tile_loadd(4, operands.x[0] + step * kLineBytes, operands.row_bytes);
    _tile_loadd(6, operands.weight[0] + step * kTileBytes, kLineBytes);
    _tile_loadd(7, operands.weight[1] + step * kTileBytes, kLineBytes);
    _tile_loadd(5, operands.x[1] + step * kLineBytes, operands.row_bytes);
    Product::run();
  }
  _tile_stored(0, sums.of[0], kLineBytes);
  _tile_stored(1, sums.of[1], kLineBytes);
  _tile_stored(2, sums.of[2], kLineBytes);
  _tile_stored(3, sums.of[3], kLineBytes);
}

// Panels whose weights stay in the core's own cache while all rows pass by.
inline std::int64_t panels_in_cache(std::int64_t panel_bytes) {
  constexpr std::int64_t cache_bytes = 1 << 20;
  return std::max<std::int64_t>(2, cache_bytes / panel_bytes / 2 * 2);
}

}  // namespace edgellm::EDGELLM_ISA

// The shapes of the eight AMX tiles, for kernels that use whole tiles or lower ones.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace edgellm::EDGELLM_ISA {

inline constexpr int kTileHeight = 16;
inline constexpr int kTileRowBytes = 64;
inline constexpr int kTileBytes = kTileHeight * kTileRowBytes;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, int height) {
    bytes_per_row[tile] = kTileRowBytes;
    rows[tile] = static_cast<std::uint8_t>(height);
  }
};

inline void load_config(const TileConfig& config) {
  asm volatile("" : : "m"(config));  // GCC 12 believes that the next line reads eight bytes only
  _tile_loadconfig(&config);
}

// All eight tiles whole, as long as it lives.
struct WholeTiles {
  WholeTiles() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.set(tile, kTileHeight);
    load_config(config);
  }
  ~WholeTiles() { _tile_release(); }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;
};

}  // namespace edgellm::EDGELLM_ISA

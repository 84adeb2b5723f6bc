// The shapes of the eight AMX tiles.
#pragma once

#include <immintrin.h>
#include <pmmintrin.h>

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

  void set(int tile, int height, int row_bytes = kTileRowBytes) {
    bytes_per_row[tile] = static_cast<std::uint16_t>(row_bytes);
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

// Tiles multiply bf16 with denormals flushed to zero, whatever the thread's settings; as long as this lives, other
// instructions do so too.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlush); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  static constexpr unsigned kFlush = _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON;
  unsigned before_;
};

}  // namespace edgellm::EDGELLM_ISA

// Weights times int8 values of up to eight vectors, on tiles. Values are operands as they lie, [tokens][channels], as
// weights stand alone in their four channels: for a token's weight w the rows are (w, 0, 0, 0), (0, w, 0, 0) and so on,
// each for one channel of four.
#pragma once

#include "attend_int8_parts.hpp"

namespace edgellm::EDGELLM_ISA {

// N: 1, 2, 4 or 8 vectors. head_dim: whole tiles.
template <int N>
class FewInt8Sums {
 public:
  FewInt8Sums(int heads, std::int64_t head_dim, void* memory)
      : heads_(heads),
        depth_(head_dim),
        sums_(static_cast<std::int32_t*>(memory)),
        weights_(reinterpret_cast<std::uint8_t*>(sums_ + heads * 2 * N * head_dim)) {}

  // Tiles 0 to 3 are sums, 4 and 5 weights, 6 values.
  void start() const {
    TileConfig config;
    for (int tile = 0; tile < 6; ++tile) config.set(tile, kRows);
    for (int tile = 6; tile < 8; ++tile) config.set(tile, kTileHeight);
    load_config(config);
    std::fill_n(sums_, heads_ * 2 * N * depth_, 0);
  }

  // A vector's weights of a block, 16 bits each.
  void set_weights(int head, int vector, const std::uint16_t* weights) const {
    std::uint8_t* out = tile_weights(head, 0) + vector * 8 * kTileRowBytes;
    part_weights(weights, out);
    part_weights(weights + kTileHeight, out + kWeightBytes);
  }

  // Adds the weights of a block times the head's values.
  void add(int head, const std::int8_t* values, std::int64_t stride) const {
    for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
      std::int32_t* out = sums(head, d);
      load_sums(out);
      add_products(tile_weights(head, 0), values + d, stride);
      add_products(tile_weights(head, 1), values + kTileHeight * stride + d, stride);
      store_sums(out);
    }
  }

  // The sums of one vector, in units of `unit`, to out [head_dim]. Row c of a part has channels c, 4 + c, 8 + c ...
  void write(int head, int vector, float unit, float* out) const {
    for (std::int64_t d = 0; d < depth_; d += kTileChannels) {
      const std::int32_t* rows = sums(head, d) + 8 * vector * kLanes;
      __m512 channels[4];
      for (int c = 0; c < 4; ++c) {
        const __m512i low = _mm512_loadu_si512(rows + c * kLanes);
        const __m512i high = _mm512_loadu_si512(rows + (4 + c) * kLanes);
        channels[c] = _mm512_mul_ps(join_parts(high, low, 256.0F), _mm512_set1_ps(unit));
      }
      interleave_four(channels);
      order_channels(channels);
      for (int i = 0; i < 4; ++i) _mm512_storeu_ps(out + d + i * kLanes, channels[i]);
    }
  }

 private:
  static constexpr int kRows = std::min(kTileHeight, 8 * N);  // of a tile: [vectors][low, high][4]
  static constexpr int kTiles = 8 * N / kRows;
  static constexpr int kTileSums = kRows * kLanes;
  static constexpr int kWeightBytes = 8 * N * kTileRowBytes;  // of sixteen tokens

  // [heads][depth / 64][N][low, high][4][16 channel quads]
  std::int32_t* sums(int head, std::int64_t d) const { return sums_ + (head * depth_ + d) * 2 * N; }
  // [heads][2][N][low, high][4][16 tokens][4]
  std::uint8_t* tile_weights(int head, int half) const { return weights_ + (2 * head + half) * kWeightBytes; }

  static void part_weights(const std::uint16_t* weights, std::uint8_t* out) {
    const __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights)));
    const __m512i low = _mm512_and_si512(both, _mm512_set1_epi32(0xff));
    const __m512i high = _mm512_srli_epi32(both, 8);
    const auto store_row = [&](int row, __m512i bytes) { _mm512_storeu_si512(out + row * kTileRowBytes, bytes); };
    store_row(0, low);
    store_row(1, _mm512_slli_epi32(low, 8));
    store_row(2, _mm512_slli_epi32(low, 16));
    store_row(3, _mm512_slli_epi32(low, 24));
    store_row(4, high);
    store_row(5, _mm512_slli_epi32(high, 8));
    store_row(6, _mm512_slli_epi32(high, 16));
    store_row(7, _mm512_slli_epi32(high, 24));
  }

  static void load_sums(const std::int32_t* sums) {
    _tile_loadd(0, sums, kTileRowBytes);
    if constexpr (kTiles > 1) _tile_loadd(1, sums + kTileSums, kTileRowBytes);
    if constexpr (kTiles > 2) _tile_loadd(2, sums + 2 * kTileSums, kTileRowBytes);
    if constexpr (kTiles > 2) _tile_loadd(3, sums + 3 * kTileSums, kTileRowBytes);
  }
  static void store_sums(std::int32_t* sums) {
    _tile_stored(0, sums, kTileRowBytes);
    if constexpr (kTiles > 1) _tile_stored(1, sums + kTileSums, kTileRowBytes);
    if constexpr (kTiles > 2) _tile_stored(2, sums + 2 * kTileSums, kTileRowBytes);
    if constexpr (kTiles > 2) _tile_stored(3, sums + 3 * kTileSums, kTileRowBytes);
  }

  // Sixteen tokens.
  static void add_products(const std::uint8_t* weights, const std::int8_t* values, std::int64_t stride) {
    _tile_loadd(4, weights, kTileRowBytes);
    _tile_loadd(6, values, stride);
    _tile_dpbusd(0, 4, 6);
    if constexpr (kTiles > 1) {
      _tile_loadd(5, weights + kTileBytes, kTileRowBytes);
      _tile_dpbusd(1, 5, 6);
    }
    if constexpr (kTiles > 2) {
      _tile_loadd(4, weights + 2 * kTileBytes, kTileRowBytes);
      _tile_dpbusd(2, 4, 6);
      _tile_loadd(5, weights + 3 * kTileBytes, kTileRowBytes);
      _tile_dpbusd(3, 5, 6);
    }
  }

  // From every fourth channel to four of every sixteen.
  static void interleave_four(__m512 (&rows)[4]) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
    rows[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    rows[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    rows[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    rows[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }

  int heads_;
  std::int64_t depth_;
  std::int32_t* sums_;
  std::uint8_t* weights_;
};

}  // namespace edgellm::EDGELLM_ISA

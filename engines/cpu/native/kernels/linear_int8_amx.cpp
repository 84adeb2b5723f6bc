// linear_int8 and linear_int8x16 on AMX tiles, which multiply the packed weights as they lie in memory. Sums are exact,
// so few rows, which would leave tiles empty, go without and get the same bits.
#include <algorithm>
#include <initializer_list>

#include "amx_tile.hpp"
#include "linear_tile.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline constexpr std::int64_t kFewRows = 12;
inline constexpr std::int64_t kTileChannels = 64;

using Sums = std::int32_t[kTileHeight * kPanelColumns];

// Two tiles of activations times two panels of weights.
struct Operands {
  const std::uint8_t* x[2];
  const std::uint8_t* weight[2];
  std::int64_t row_bytes, channels;
};

// Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
void configure(int first_height, int second_height) {
  TileConfig config;
  for (const int tile : {0, 1, 4}) config.set(tile, first_height);
  for (const int tile : {2, 3, 5}) config.set(tile, second_height);
  for (const int tile : {6, 7}) config.set(tile, kTileHeight);
  load_config(config);
}

// sums[2 * i + j] = x[i] . weight[j].
void multiply(const Operands& operands, Sums (&sums)[4]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < operands.channels; k += kTileChannels) {
    _tile_loadd(4, operands.x[0] + k, operands.row_bytes);
    _tile_loadd(6, operands.weight[0] + k * kPanelColumns, kLineBytes);
    _tile_loadd(7, operands.weight[1] + k * kPanelColumns, kLineBytes);
    _tile_loadd(5, operands.x[1] + k, operands.row_bytes);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums[0], kLineBytes);
  _tile_stored(1, sums[1], kLineBytes);
  _tile_stored(2, sums[2], kLineBytes);
  _tile_stored(3, sums[3], kLineBytes);
}

const std::uint8_t* x_of(const LinearArgs& args, std::int64_t row) { return args.x.data + row * args.x.row_bytes; }

// Two panels from `panel` on; where the second does not exist, the first one twice.
Operands operands_of(const LinearArgs& args, std::int64_t panel, std::int64_t end) {
  const std::uint8_t* weight = args.weight + panel * args.channels * kPanelColumns;
  const std::uint8_t* next = panel + 1 < end ? weight + args.channels * kPanelColumns : weight;
  return {{}, {weight, next}, args.x.row_bytes, args.channels};
}

I32 sum_of(const Sums& sums, int row) { return load_i32(sums + row * kPanelColumns); }

// 32 rows at a time; where there are no more than 16, the same ones twice.
struct Int8Rows {
  static constexpr int kRows = 2 * kTileHeight;

  static void run(const LinearArgs& args, std::int64_t row, int height, std::int64_t begin, std::int64_t end) {
    const int first = std::min(height, kTileHeight);
    const int second = height > kTileHeight ? height - kTileHeight : first;
    configure(first, second);
    alignas(64) Sums sums[4];
    for (std::int64_t panel = begin; panel < end; panel += 2) {
      Operands operands = operands_of(args, panel, end);
      operands.x[0] = x_of(args, row);
      operands.x[1] = height > kTileHeight ? x_of(args, row + kTileHeight) : operands.x[0];
      multiply(operands, sums);
      for (int p = 0; p < 2 && panel + p < end; ++p) {
        for (int r = 0; r < height; ++r) {
          const I32 sum = sum_of(sums[r / kTileHeight * 2 + p], r % kTileHeight);
          finish_int8(args, row + r, panel + p, sum);
        }
      }
    }
  }
};

// 16 rows at a time: their high and their low parts.
struct Int8x16Rows {
  static constexpr int kRows = kTileHeight;

  static void run(const LinearArgs& args, std::int64_t row, int height, std::int64_t begin, std::int64_t end) {
    configure(height, height);
    alignas(64) Sums sums[4];
    for (std::int64_t panel = begin; panel < end; panel += 2) {
      Operands operands = operands_of(args, panel, end);
      operands.x[0] = x_of(args, row);
      operands.x[1] = operands.x[0] + args.channels;
      multiply(operands, sums);
      for (int p = 0; p < 2 && panel + p < end; ++p) {
        for (int r = 0; r < height; ++r) {
          finish_int8x16(args, row + r, panel + p, sum_of(sums[p], r), sum_of(sums[2 + p], r));
        }
      }
    }
  }
};

// Panels whose weights stay in the core's own cache while all rows pass by.
std::int64_t panels_in_cache(const LinearArgs& args) {
  constexpr std::int64_t bytes = 1 << 19;
  return std::max<std::int64_t>(2, bytes / (args.channels * kPanelColumns) / 2 * 2);
}

template <class RowBlock>
void run_rows(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t panels = panels_in_cache(args);
  for (std::int64_t panel = begin; panel < end; panel += panels) {
    for (std::int64_t row = 0; row < args.rows; row += RowBlock::kRows) {
      const int height = static_cast<int>(std::min<std::int64_t>(args.rows - row, RowBlock::kRows));
      RowBlock::run(args, row, height, panel, std::min(end, panel + panels));
    }
  }
  _tile_release();
}

}  // namespace

void linear_int8_tiles(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  args.rows <= kFewRows ? linear_int8(args, begin, end) : run_rows<Int8Rows>(args, begin, end);
}

void linear_int8x16_tiles(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  args.rows <= kFewRows ? linear_int8x16(args, begin, end) : run_rows<Int8x16Rows>(args, begin, end);
}

}  // namespace edgellm::EDGELLM_ISA

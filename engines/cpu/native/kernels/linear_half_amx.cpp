// linear_half on AMX tiles: a panel's 32 channels are one 1 KiB operand as it lies in memory. The rounding of a sum is
// the tile unit's own, other than AVX-512's, so one row goes through tiles too: then every row gets the same bits in
// any company. A tile's row count never enters a row's result.
#include <initializer_list>

#include "amx_tile.hpp"
#include "linear_tile.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline constexpr std::int64_t kTileChannels = 32;

// Sums of one tile to bias, residual and output.
void finish_tile(const LinearArgs& args, const float* sums, std::int64_t row, int height, std::int64_t panel) {
  for (int r = 0; r < height; ++r) {
    finish(args, row + r, panel, load(sums + r * kPanelColumns));
  }
}

struct Operands {
  const std::uint8_t* x;       // records of the block's first row
  const std::uint8_t* weight;  // first panel
  std::int64_t row_bytes, panel_bytes, channels;

  Operands(const LinearArgs& args, std::int64_t row, std::int64_t panel)
      : x(args.x.data + row * args.x.row_bytes),
        weight(args.weight + panel * args.channels / 2 * kLineBytes),
        row_bytes(args.x.row_bytes),
        panel_bytes(args.channels / 2 * kLineBytes),
        channels(args.channels) {}
  const std::uint8_t* x_tile(std::int64_t k, std::int64_t row) const { return x + row * row_bytes + 2 * k; }
  const std::uint8_t* weight_tile(std::int64_t k, std::int64_t panel) const {
    return weight + panel * panel_bytes + k / kTileChannels * kTileBytes;
  }
};

// Rows in (16, 32] and two panels: tiles 0..3 are sums, 4 and 5 activations, 6 and 7 weights.
void run_two_by_two(const LinearArgs& args, std::int64_t row, int height, std::int64_t panel) {
  const Operands at(args, row, panel);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < at.channels; k += kTileChannels) {
    _tile_loadd(4, at.x_tile(k, 0), at.row_bytes);
    _tile_loadd(6, at.weight_tile(k, 0), kLineBytes);
    _tile_loadd(7, at.weight_tile(k, 1), kLineBytes);
    _tile_loadd(5, at.x_tile(k, kTileHeight), at.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[4][kTileHeight * kPanelColumns];
  _tile_stored(0, sums[0], kLineBytes);
  _tile_stored(1, sums[1], kLineBytes);
  _tile_stored(2, sums[2], kLineBytes);
  _tile_stored(3, sums[3], kLineBytes);
  finish_tile(args, sums[0], row, kTileHeight, panel);
  finish_tile(args, sums[1], row, kTileHeight, panel + 1);
  finish_tile(args, sums[2], row + kTileHeight, height - kTileHeight, panel);
  finish_tile(args, sums[3], row + kTileHeight, height - kTileHeight, panel + 1);
}

// Up to 16 rows and two panels: tiles 0 and 1 are sums, 4 activations, 6 and 7 weights.
void run_one_by_two(const LinearArgs& args, std::int64_t row, int height, std::int64_t panel) {
  const Operands at(args, row, panel);
  _tile_zero(0);
  _tile_zero(1);
  for (std::int64_t k = 0; k < at.channels; k += kTileChannels) {
    _tile_loadd(4, at.x_tile(k, 0), at.row_bytes);
    _tile_loadd(6, at.weight_tile(k, 0), kLineBytes);
    _tile_loadd(7, at.weight_tile(k, 1), kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  alignas(64) float sums[2][kTileHeight * kPanelColumns];
  _tile_stored(0, sums[0], kLineBytes);
  _tile_stored(1, sums[1], kLineBytes);
  finish_tile(args, sums[0], row, height, panel);
  finish_tile(args, sums[1], row, height, panel + 1);
}

// Up to 16 rows and the last, odd panel.
void run_one_by_one(const LinearArgs& args, std::int64_t row, int height, std::int64_t panel) {
  const Operands at(args, row, panel);
  _tile_zero(0);
  for (std::int64_t k = 0; k < at.channels; k += kTileChannels) {
    _tile_loadd(4, at.x_tile(k, 0), at.row_bytes);
    _tile_loadd(6, at.weight_tile(k, 0), kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
  }
  alignas(64) float sums[kTileHeight * kPanelColumns];
  _tile_stored(0, sums, kLineBytes);
  finish_tile(args, sums, row, height, panel);
}

// Shapes for a block of `height` rows: the first 16 in tiles 0, 1 and 4, the others in tiles 2, 3 and 5.
void configure(int height) {
  TileConfig config;
  const int first = height < kTileHeight ? height : kTileHeight;
  const int second = height > kTileHeight ? height - kTileHeight : kTileHeight;
  for (const int tile : {0, 1, 4}) config.set(tile, first);
  for (const int tile : {2, 3, 5}) config.set(tile, second);
  for (const int tile : {6, 7}) config.set(tile, kTileHeight);
  load_config(config);
}

void run_block(const LinearArgs& args, std::int64_t row, int height, std::int64_t begin, std::int64_t end) {
  std::int64_t panel = begin;
  for (; panel + 2 <= end; panel += 2) {
    if (height > kTileHeight) {
      run_two_by_two(args, row, height, panel);
    } else {
      run_one_by_two(args, row, height, panel);
    }
  }
  for (; panel < end; ++panel) {
    // One panel leaves the tiles of the second 16 rows without a loop of their own: two blocks of 16.
    for (int done = 0; done < height; done += kTileHeight) {
      const int rows = height - done < kTileHeight ? height - done : kTileHeight;
      configure(rows);
      run_one_by_one(args, row + done, rows, panel);
    }
    configure(height);
  }
}

}  // namespace

void linear_half(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t block_rows = 2 * kTileHeight;
  int configured = 0;
  for (std::int64_t row = 0; row < args.rows; row += block_rows) {
    const int height = static_cast<int>(args.rows - row < block_rows ? args.rows - row : block_rows);
    if (height != configured) {
      configure(height);
      configured = height;
    }
    run_block(args, row, height, begin, end);
  }
  _tile_release();
}

}  // namespace edgellm::EDGELLM_ISA

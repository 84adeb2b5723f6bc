// linear_int4 on AMX tiles: weights of some panels are unpacked to int8 once for all rows. Sums inside a group are
// exact, and groups are added in the same order with the same roundings as without tiles, so few rows, for which
// unpacking would not pay, go there and get the same bits.
#include <algorithm>
#include <initializer_list>
#include <numeric>

#include "amx_tile.hpp"
#include "linear_tile.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline constexpr std::int64_t kFewRows = 12;
inline constexpr std::int64_t kUnpackedChannels = 2048;  // of a panel: 32 KiB
inline constexpr std::int64_t kUnpackedPanels = 4;       // four lines of a row of `out` are written together
inline constexpr std::int64_t kOutlierChannels = 32;     // of one tile product

// Channels of one tile product; a whole number of them is a group.
std::int64_t step_of(std::int64_t group_size) {
  if (group_size % 64 == 0) return 64;
  return group_size < 64 ? group_size : std::gcd(group_size, std::int64_t{64});
}

// Tiles 0 and 1 are sums, 4 and 5 activations [height, step], 6 and 7 weights [step / 4, 16 columns, 4].
void configure(int height, std::int64_t step) {
  TileConfig config;
  for (const int tile : {0, 1}) config.set(tile, height);
  for (const int tile : {4, 5}) config.set(tile, height, static_cast<int>(step));
  for (const int tile : {6, 7}) config.set(tile, static_cast<int>(step / 4));
  load_config(config);
}

// Tile 0 is sums; of whole products of outliers tile 4 is the activations, 6 the weights; of the last, 5 and 7.
void configure_outliers(int height, std::int64_t outliers) {
  const auto last = static_cast<int>(outliers % kOutlierChannels);
  TileConfig config;
  config.set(0, height);
  config.set(4, height);
  config.set(6, kTileHeight);
  if (last > 0) {  // a tile with rows and no bytes is refused by a fault
    config.set(5, height, 2 * last);
    config.set(7, last / 2);
  }
  load_config(config);
}

using Sums = float[kTileHeight * kPanelColumns];  // or as many int32

// Up to 16 rows of one panel.
struct Block {
  const LinearArgs& args;
  std::int64_t row, panel;
  int height;

  const std::uint8_t* x() const { return args.x.data + row * args.x.row_bytes; }
  float* out(int r) const { return args.out.data + (row + r) * args.out.stride + panel * kPanelColumns; }
  int columns() const { return static_cast<int>(args.columns - panel * kPanelColumns); }
};

// Groups [first, first + count) of a panel as signed int8 [channels / 4, 16 columns, 4].
struct Unpacked {
  std::int64_t first, count;
  alignas(64) std::int8_t data[kUnpackedChannels * kPanelColumns];

  void load(const LinearArgs& args, std::int64_t panel, std::int64_t group) {
    const std::int64_t groups = args.channels / args.group_size;
    first = group;
    count = std::min(groups - group, kUnpackedChannels / args.group_size);
    const std::uint8_t* lines = args.weight + (panel * groups + group) * args.group_size / 8 * kLineBytes;
    const __m512i offset = _mm512_set1_epi8(8);
    for (std::int64_t i = 0; i < count * args.group_size / 8; ++i) {
      const Int4Line line = load_int4_line(lines + i * kLineBytes);
      _mm512_store_si512(data + 2 * i * kLineBytes, _mm512_sub_epi8(line.low, offset));
      _mm512_store_si512(data + (2 * i + 1) * kLineBytes, _mm512_sub_epi8(line.high, offset));
    }
  }
  std::int64_t end() const { return first + count; }
};

// One group's operands.
struct GroupOperands {
  const std::uint8_t* x;
  const std::int8_t* weight;
  std::int64_t row_bytes, size, step;

  GroupOperands(const Block& block, const Unpacked& weights, std::int64_t group)
      : x(block.x() + group * block.args.group_size),
        weight(weights.data + (group - weights.first) * block.args.group_size * kPanelColumns),
        row_bytes(block.args.x.row_bytes),
        size(block.args.group_size),
        step(step_of(size)) {}
};

void multiply_even(const GroupOperands& group) {
  _tile_zero(0);
  for (std::int64_t k = 0; k < group.size; k += group.step) {
    _tile_loadd(4, group.x + k, group.row_bytes);
    _tile_loadd(6, group.weight + k * kPanelColumns, kLineBytes);
    _tile_dpbssd(0, 4, 6);
  }
}

void multiply_odd(const GroupOperands& group) {
  _tile_zero(1);
  for (std::int64_t k = 0; k < group.size; k += group.step) {
    _tile_loadd(5, group.x + k, group.row_bytes);
    _tile_loadd(7, group.weight + k * kPanelColumns, kLineBytes);
    _tile_dpbssd(1, 5, 7);
  }
}

void add_group(const Block& block, std::int64_t group, const Sums& sums, F32 (&totals)[kTileHeight]) {
  const std::int64_t groups = block.args.channels / block.args.group_size;
  const F32 scale = load_f16(block.args.group_scale + (block.panel * groups + group) * kPanelColumns);
#pragma GCC unroll 16
  for (int r = 0; r < kTileHeight; ++r) totals[r] = fma(to_f32(load_i32(sums + r * kPanelColumns)), scale, totals[r]);
}

// A pipeline: while a group is multiplied, the sums of the one before are stored, and those of the one before that,
// which have reached the cache, are scaled and added.
void add_groups(const Block& block, const Unpacked& weights, F32 (&totals)[kTileHeight]) {
  alignas(64) Sums sums[4];
  for (std::int64_t i = 0; i < weights.count + 3; ++i) {
    if (i < weights.count) {
      const GroupOperands group(block, weights, weights.first + i);
      i % 2 == 0 ? multiply_even(group) : multiply_odd(group);
    }
    if (1 <= i && i <= weights.count) {
      if (i % 2 == 0) {
        _tile_stored(1, sums[(i - 1) % 4], kLineBytes);
      } else {
        _tile_stored(0, sums[(i - 1) % 4], kLineBytes);
      }
    }
    if (3 <= i) add_group(block, weights.first + i - 3, sums[(i - 3) % 4], totals);
  }
}

void multiply_outliers(const Block& block, Sums& sums) {
  const LinearArgs& args = block.args;
  const std::uint8_t* weight = args.outlier_weight + block.panel * args.outliers / 2 * kLineBytes;
  const std::uint8_t* x = block.x() + args.x.outliers_at;
  _tile_zero(0);
  std::int64_t o = 0;
  for (; o + kOutlierChannels <= args.outliers; o += kOutlierChannels) {
    _tile_loadd(4, x + 2 * o, args.x.row_bytes);
    _tile_loadd(6, weight + o / 2 * kLineBytes, kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
  }
  if (o < args.outliers) {
    _tile_loadd(5, x + 2 * o, args.x.row_bytes);
    _tile_loadd(7, weight + o / 2 * kLineBytes, kLineBytes);
    _tile_dpbf16ps(0, 5, 7);
  }
  _tile_stored(0, sums, kLineBytes);
}

// Writes what follows the last group; see finish_int4.
void finish_block(const Block& block, const F32 (&totals)[kTileHeight], const Sums& outliers) {
  const LinearArgs& args = block.args;
  const F32 column_scale = load(args.column_scale + block.panel * kPanelColumns);
  for (int r = 0; r < block.height; ++r) {
    const F32 scale = set1(*record_at<float>(args, block.row + r, args.x.scale_at));
    const F32 y = mul(mul(totals[r], scale), column_scale);
    finish(args, block.row + r, block.panel, add(y, load(outliers + r * kPanelColumns)));
  }
}

// The groups that are unpacked; the sum of those before them lies in `out`.
void run_block(const Block& block, const Unpacked& weights, const Sums& outliers) {
  F32 totals[kTileHeight];
  for (int r = 0; r < kTileHeight; ++r) {
    const bool is_later = weights.first != 0 && r < block.height;
    totals[r] = is_later ? load_n(block.out(r), block.columns()) : zero();
  }
  add_groups(block, weights, totals);
  if (weights.end() * block.args.group_size == block.args.channels) {
    finish_block(block, totals, outliers);
    return;
  }
  for (int r = 0; r < block.height; ++r) store_n(block.out(r), totals[r], block.columns());
}

// A few panels, unpacked, and what outliers add to sixteen rows of them.
struct Panels {
  Unpacked weights[kUnpackedPanels];
  alignas(64) Sums outliers[kUnpackedPanels] = {};
};

void run_rows(const LinearArgs& args, std::int64_t row, std::int64_t begin, std::int64_t end, Panels& panels) {
  const int height = static_cast<int>(std::min<std::int64_t>(args.rows - row, kTileHeight));
  if (args.outliers > 0) {
    configure_outliers(height, args.outliers);
    for (std::int64_t panel = begin; panel < end; ++panel) {
      multiply_outliers({args, row, panel, height}, panels.outliers[panel - begin]);
    }
  }
  configure(height, step_of(args.group_size));
  for (std::int64_t panel = begin; panel < end; ++panel) {
    run_block({args, row, panel, height}, panels.weights[panel - begin], panels.outliers[panel - begin]);
  }
}

void run_panels(const LinearArgs& args, std::int64_t begin, std::int64_t end, Panels& panels) {
  for (std::int64_t group = 0; group < args.channels / args.group_size; group = panels.weights[0].end()) {
    for (std::int64_t panel = begin; panel < end; ++panel) panels.weights[panel - begin].load(args, panel, group);
    for (std::int64_t row = 0; row < args.rows; row += kTileHeight) run_rows(args, row, begin, end, panels);
  }
}

}  // namespace

void linear_int4_tiles(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const FlushDenormals as_tiles_do;
  if (args.rows <= kFewRows || args.group_size > kUnpackedChannels) {
    linear_int4(args, begin, end);
    return;
  }
  Panels panels;
  for (std::int64_t panel = begin; panel < end; panel += kUnpackedPanels) {
    run_panels(args, panel, std::min(end, panel + kUnpackedPanels), panels);
  }
  _tile_release();
}

}  // namespace edgellm::EDGELLM_ISA

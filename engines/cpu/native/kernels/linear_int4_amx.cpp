// linear_int4 on AMX tiles. Weights are unpacked to int8 part by part, in the core's first cache, while the part before
// is multiplied with all rows, and fetched from memory one part earlier still. Sums inside a group are exact, and
// groups are added in the same order with the same roundings as without tiles, so few rows, for which unpacking would
// not pay, go there and get the same bits.
#include <algorithm>
#include <array>
#include <numeric>

#include "amx_tile.hpp"
#include "int4_parts.hpp"
#include "linear_tile.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline constexpr std::int64_t kFewRows = 7;
inline constexpr std::int64_t kOutlierChannels = 32;  // of one tile product

// Channels of one tile product; a whole number of them is a group.
std::int64_t step_of(std::int64_t group_size) {
  if (group_size % 64 == 0) return 64;
  return group_size < 64 ? group_size : std::gcd(group_size, std::int64_t{64});
}

// Tiles 0 and 1 are sums, 2 activations [height, step], 3 weights [step / 4, 16 columns, 4]. Of whole products of
// outliers tile 4 is the activations, 6 the weights; of the last, 5 and 7.
void configure(int height, std::int64_t step, std::int64_t outliers) {
  const auto last = static_cast<int>(outliers % kOutlierChannels);
  TileConfig config;
  for (const int tile : {0, 1, 4}) config.set(tile, height);
  config.set(2, height, static_cast<int>(step));
  config.set(3, static_cast<int>(step / 4));
  config.set(6, kTileHeight);
  if (last > 0) {  // a tile with rows and no bytes is refused by a fault
    config.set(5, height, 2 * last);
    config.set(7, last / 2);
  }
  load_config(config);
}

using Sums = float[kTileHeight * kPanelColumns];  // or as many int32

// Rows [begin, begin + height) of a step, in blocks of one height; the first `others` are also of the block before.
struct RowBlock {
  std::int64_t begin;
  int height, others;
};

struct RowBlocks {
  std::int64_t rows, count, height;

  explicit RowBlocks(std::int64_t all)
      : rows(all), count((all + kTileHeight - 1) / kTileHeight), height((all + count - 1) / count) {}
  RowBlock at(std::int64_t index) const {
    const std::int64_t begin = std::min(index * height, rows - height);
    return {begin, static_cast<int>(height), static_cast<int>(index * height - begin)};
  }
};

// Some rows of a part.
struct Block {
  const LinearArgs& args;
  const Part& part;
  RowBlock rows;

  const std::uint8_t* x() const { return args.x.data + rows.begin * args.x.row_bytes; }
  std::int64_t row(int r) const { return rows.begin + r; }
  float* out(int r) const { return args.out.data + row(r) * args.out.stride + part.panel * kPanelColumns; }
  int columns() const { return static_cast<int>(args.columns - part.panel * kPanelColumns); }
  bool has(int r) const { return rows.others <= r && r < rows.height; }
  bool starts() const { return part.first == 0; }
  bool ends() const { return (part.first + part.count) * args.group_size == args.channels; }
};

// Group after group of a block's operands.
struct GroupOperands {
  const std::uint8_t* x;
  const std::int8_t* weight;
  std::int64_t row_bytes, size, step;

  GroupOperands(const Block& block, const Unpacked& weights)
      : x(block.x() + block.part.first * block.args.group_size),
        weight(weights.data),
        row_bytes(block.args.x.row_bytes),
        size(block.args.group_size),
        step(step_of(size)) {}
};

inline void load_operands(const GroupOperands& group) {
  _tile_loadd(2, group.x, group.row_bytes);
  _tile_loadd(3, group.weight, kLineBytes);
}

// Tiles are cleared after their last use: where another hardware thread shares the core, a load into a tile else waits
// for what the tile held.
inline void drop_operands(GroupOperands& group) {
  _tile_zero(2);
  _tile_zero(3);
  group.x += group.step;
  group.weight += group.step * kPanelColumns;
}

inline void multiply_even(GroupOperands& group) {
  for (std::int64_t k = 0; k < group.size; k += group.step) {
    load_operands(group);
    _tile_dpbssd(0, 2, 3);
    drop_operands(group);
  }
}

inline void multiply_odd(GroupOperands& group) {
  for (std::int64_t k = 0; k < group.size; k += group.step) {
    load_operands(group);
    _tile_dpbssd(1, 2, 3);
    drop_operands(group);
  }
}

inline void store_even(Sums& sums) {
  _tile_stored(0, sums, kLineBytes);
  _tile_zero(0);
}

inline void store_odd(Sums& sums) {
  _tile_stored(1, sums, kLineBytes);
  _tile_zero(1);
}

template <int Height>
void add_group(const std::uint16_t* group_scale, const Sums& sums, F32 (&totals)[Height]) {
  const F32 scale = mul(load_f16(group_scale), set1(1.0F / kUnpackedScale));
#pragma GCC unroll 16
  for (int r = 0; r < Height; ++r) totals[r] = fma(to_f32(load_i32(sums + r * kPanelColumns)), scale, totals[r]);
}

// A pipeline: while a group is multiplied, the sums of the one before are stored, and those of an earlier one, which
// have reached the cache, are scaled and added; and some lines of the next part are unpacked.
template <int Height>
void add_groups(const Block& block, const Unpacked& weights, Unpacking& next, std::int64_t lines,
                F32 (&totals)[Height]) {
  alignas(64) Sums sums[4];
  GroupOperands operands(block, weights);
  const std::int64_t groups = block.args.channels / block.args.group_size;
  const std::uint16_t* scale = block.args.group_scale + (block.part.panel * groups + block.part.first) * kPanelColumns;
  _tile_zero(0);
  _tile_zero(1);
  for (std::int64_t i = 0; i < block.part.count + 3; ++i) {
    if (i < block.part.count) {
      i % 2 == 0 ? multiply_even(operands) : multiply_odd(operands);
      next.run(lines);
    }
    if (1 <= i && i <= block.part.count) i % 2 == 0 ? store_odd(sums[(i - 1) % 4]) : store_even(sums[(i - 1) % 4]);
    if (3 <= i) add_group(scale + (i - 3) * kPanelColumns, sums[(i - 3) % 4], totals);
  }
}

void multiply_outliers(const Block& block, Sums& sums) {
  const LinearArgs& args = block.args;
  const std::uint8_t* weight = args.outlier_weight + block.part.panel * args.outliers / 2 * kLineBytes;
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
template <int Height>
void finish_block(const Block& block, const F32 (&totals)[Height]) {
  const LinearArgs& args = block.args;
  alignas(64) Sums outliers = {};
  if (args.outliers > 0) multiply_outliers(block, outliers);
  const F32 column_scale = load(args.column_scale + block.part.panel * kPanelColumns);
  for (int r = 0; r < Height; ++r) {
    if (!block.has(r)) continue;
    const F32 scale = set1(*record_at<float>(args, block.row(r), args.x.scale_at));
    const F32 y = mul(mul(totals[r], scale), column_scale);
    finish(args, block.row(r), block.part.panel, add(y, load(outliers + r * kPanelColumns)));
  }
}

// The sum of the groups before the part lies in `out`.
template <int Height>
void run_block(const Block& block, const Unpacked& weights, Unpacking& next, std::int64_t lines) {
  F32 totals[Height];
  for (int r = 0; r < Height; ++r) {
    totals[r] = !block.starts() && block.has(r) ? load_n(block.out(r), block.columns()) : zero();
  }
  add_groups(block, weights, next, lines, totals);
  if (block.ends()) {
    finish_block(block, totals);
    return;
  }
  for (int r = 0; r < Height; ++r) {
    if (block.has(r)) store_n(block.out(r), totals[r], block.columns());
  }
}

void run_part(const LinearArgs& args, const Part& part, const Unpacked& weights, Unpacking& next) {
  const RowBlocks blocks(args.rows);
  const std::int64_t steps = blocks.count * part.count;
  const std::int64_t lines = (next.lines + steps - 1) / steps;
  for (std::int64_t i = 0; i < blocks.count; ++i) {
    const Block block{args, part, blocks.at(i)};
    blocks.height <= kTileHeight / 2 ? run_block<kTileHeight / 2>(block, weights, next, lines)
                                     : run_block<kTileHeight>(block, weights, next, lines);
  }
}

}  // namespace

void linear_int4_tiles(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const FlushDenormals as_tiles_do;
  if (args.rows <= kFewRows || args.group_size > kPartChannels) {
    linear_int4(args, begin, end);
    return;
  }
  const Parts parts(args, begin, end);
  std::array<Unpacked, 2> weights;
  Unpacking first(args, parts.at(0), parts.at(1), weights[0]);
  first.run(first.lines);
  configure(static_cast<int>(RowBlocks(args.rows).height), step_of(args.group_size), args.outliers);
  for (std::int64_t i = 0; i < parts.count(); ++i) {
    Unpacking next(args, parts.at(i + 1), parts.at(i + 2), weights[(i + 1) % 2]);
    run_part(args, parts.at(i), weights[i % 2], next);
  }
  _tile_release();
}

}  // namespace edgellm::EDGELLM_ISA

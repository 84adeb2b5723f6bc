// linear_int8 and linear_int8x16 on AMX tiles, which multiply the packed weights as they lie in memory. Sums are exact,
// so few rows, which would leave tiles empty, go without and get the same bits.
#include "amx_product.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline constexpr std::int64_t kFewRows = 12;
inline constexpr std::int64_t kTileChannels = 64;

struct Int8Product {
  static void run() {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
};

const std::uint8_t* x_of(const LinearArgs& args, std::int64_t row) { return args.x.data + row * args.x.row_bytes; }

// Two panels from `panel` on; where the second does not exist, the first one twice.
TileOperands operands_of(const LinearArgs& args, std::int64_t panel, std::int64_t end) {
  const std::uint8_t* weight = args.weight + panel * args.channels * kPanelColumns;
  const std::uint8_t* next = panel + 1 < end ? weight + args.channels * kPanelColumns : weight;
  return {{}, {weight, next}, args.x.row_bytes, args.channels / kTileChannels};
}

// 32 rows at a time; where there are no more than 16, the same ones twice.
struct Int8Rows {
  static constexpr int kRows = 2 * kTileHeight;

  static void run(const LinearArgs& args, std::int64_t row, int height, std::int64_t begin, std::int64_t end) {
    const int first = std::min(height, kTileHeight);
    const int second = height > kTileHeight ? height - kTileHeight : first;
    configure_product(first, second);
    TileSums sums;
    for (std::int64_t panel = begin; panel < end; panel += 2) {
      TileOperands operands = operands_of(args, panel, end);
      operands.x[0] = x_of(args, row);
      operands.x[1] = height > kTileHeight ? x_of(args, row + kTileHeight) : operands.x[0];
      multiply<Int8Product>(operands, true, sums);
      for (int p = 0; p < 2 && panel + p < end; ++p) {
        for (int r = 0; r < height; ++r) {
          finish_int8(args, row + r, panel + p, load_i32(sums.row(r / kTileHeight, p, r % kTileHeight)));
        }
      }
    }
  }
};

// 16 rows at a time: their high and their low parts.
struct Int8x16Rows {
  static constexpr int kRows = kTileHeight;

  static void run(const LinearArgs& args, std::int64_t row, int height, std::int64_t begin, std::int64_t end) {
    configure_product(height, height);
    TileSums sums;
    for (std::int64_t panel = begin; panel < end; panel += 2) {
      TileOperands operands = operands_of(args, panel, end);
      operands.x[0] = x_of(args, row);
      operands.x[1] = operands.x[0] + args.channels;
      multiply<Int8Product>(operands, true, sums);
      for (int p = 0; p < 2 && panel + p < end; ++p) {
        for (int r = 0; r < height; ++r) {
          finish_int8x16(args, row + r, panel + p, load_i32(sums.row(0, p, r)), load_i32(sums.row(1, p, r)));
        }
      }
    }
  }
};

template <class RowBlock>
void run_rows(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t panels = panels_in_cache(args.channels * kPanelColumns);
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

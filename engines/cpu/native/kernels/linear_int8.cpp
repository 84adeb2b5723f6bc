#include "linear_tile.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

// Integer sums over all channels, then one scaling per value.
struct Int8Tile {
  template <int Rows, int Panels, class Ask = NotAsking>
  static void run(const LinearArgs& args, std::int64_t row, std::int64_t panel) {
    const std::uint8_t* weight = args.weight + panel * args.panel_bytes;
    const std::int8_t* x[Rows];
    I32 sum[Rows][Panels];
    for (int r = 0; r < Rows; ++r) {
      x[r] = record_at<std::int8_t>(args, row + r, 0);
      for (int p = 0; p < Panels; ++p) sum[r][p] = set1_i32(0);
    }
    const Ask ask(args, weight);
    for (std::int64_t k = 0; k < args.channels; k += 4) {
      for (int p = 0; p < Panels; ++p) {
        const std::uint8_t* line_at = weight + p * args.panel_bytes + k / 4 * kLineBytes;
        ask.line(line_at);
        const Int8Line line = load_int8_line(line_at);
        for (int r = 0; r < Rows; ++r) sum[r][p] = dot_int8(sum[r][p], line, x[r] + k);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int p = 0; p < Panels; ++p) finish_int8(args, row + r, panel + p, sum[r][p]);
    }
  }
};

// 15-bit activations as two int8 parts: each weight is loaded once and multiplied with both, exactly.
struct Int8x16Tile {
  static constexpr int kMaxSums = kTileRows * kTilePanels / 2;  // a value takes two registers

  template <int Rows, int Panels, class Ask = NotAsking>
  static void run(const LinearArgs& args, std::int64_t row, std::int64_t panel) {
    if constexpr (Rows > 1 && Rows * Panels > kMaxSums) {
      run<Rows / 2, Panels, Ask>(args, row, panel);
      run<Rows - Rows / 2, Panels, Ask>(args, row + Rows / 2, panel);
    } else {
      run_tile<Rows, Panels, Ask>(args, row, panel);
    }
  }

  template <int Rows, int Panels, class Ask = NotAsking>
  static void run_tile(const LinearArgs& args, std::int64_t row, std::int64_t panel) {
    const std::uint8_t* weight = args.weight + panel * args.panel_bytes;
    const std::int8_t* x[Rows];
    I32 high[Rows][Panels];
    I32 low[Rows][Panels];
    for (int r = 0; r < Rows; ++r) {
      x[r] = record_at<std::int8_t>(args, row + r, 0);
      for (int p = 0; p < Panels; ++p) high[r][p] = low[r][p] = set1_i32(0);
    }
    const Ask ask(args, weight);
    for (std::int64_t k = 0; k < args.channels; k += 4) {
      for (int p = 0; p < Panels; ++p) {
        const std::uint8_t* line_at = weight + p * args.panel_bytes + k / 4 * kLineBytes;
        ask.line(line_at);
        const Int8Line line = load_int8_line(line_at);
        for (int r = 0; r < Rows; ++r) {
          high[r][p] = dot_int8(high[r][p], line, x[r] + k);
          low[r][p] = dot_int8(low[r][p], line, x[r] + args.channels + k);
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int p = 0; p < Panels; ++p) finish_int8x16(args, row + r, panel + p, high[r][p], low[r][p]);
    }
  }
};

}  // namespace

void linear_int8(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  walk_panels<Int8Tile>(args, begin, end);
}

void linear_int8x16(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  walk_panels<Int8x16Tile>(args, begin, end);
}

}  // namespace edgellm::EDGELLM_ISA

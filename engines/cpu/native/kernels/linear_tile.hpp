// How a linear walks its output: tiles of `Rows` rows and `Panels` panels, each tile reducing over all channels in
// order. The tile's size decides only which sums are in registers together, never the order inside one sum.
#pragma once

#include "../simd/simd.hpp"
#include "linear.hpp"

namespace edgellm::EDGELLM_ISA {

template <class T>
inline const T* record_at(const LinearArgs& args, std::int64_t row, std::int64_t offset) {
  return reinterpret_cast<const T*>(args.x.data + row * args.x.row_bytes + offset);
}

inline F32 add_outliers(const LinearArgs& args, std::int64_t row, std::int64_t panel, F32 y) {
  const auto* x = record_at<HalfIn>(args, row, args.x.outliers_at);
  const std::uint8_t* weight = args.outlier_weight + panel * args.outliers / 2 * kLineBytes;
  for (std::int64_t o = 0; o < args.outliers; o += 2) {
    y = dot_half(y, load_half_line(weight + o / 2 * kLineBytes), x + o);
  }
  return y;
}

// Bias and residual, then the store of a panel's existing columns.
inline void finish(const LinearArgs& args, std::int64_t row, std::int64_t panel, F32 y) {
  const std::int64_t column = panel * kPanelColumns;
  const int n = static_cast<int>(args.columns - column);
  if (args.bias != nullptr) {
    y = add(y, load(args.bias + column));
  }
  if (args.residual != nullptr) {
    y = add(y, load_n(args.residual + row * args.residual_stride + column, n));
  }
  store_n(args.out.data + row * args.out.stride + column, y, n);
}

template <class Tile, int Panels>
void walk_rows(const LinearArgs& args, std::int64_t panel) {
  std::int64_t row = 0;
  for (; row + kTileRows <= args.rows; row += kTileRows) {
    Tile::template run<kTileRows, Panels>(args, row, panel);
  }
  if constexpr (kTileRows > 4) {
    if (row + 4 <= args.rows) {
      Tile::template run<4, Panels>(args, row, panel);
      row += 4;
    }
  }
  if (row + 2 <= args.rows) {
    Tile::template run<2, Panels>(args, row, panel);
    row += 2;
  }
  if (row < args.rows) {
    Tile::template run<1, Panels>(args, row, panel);
  }
}

// One or two rows leave registers free: more panels at a time hide the latency of the sums.
inline constexpr int kFewRowsPanels = 4;

template <class Tile>
void walk_few_rows(const LinearArgs& args, std::int64_t panel) {
  if (args.rows == 2) {
    Tile::template run<2, kFewRowsPanels>(args, 0, panel);
  } else if (args.rows == 1) {
    Tile::template run<1, kFewRowsPanels>(args, 0, panel);
  }
}

template <class Tile>
void walk_panels(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  std::int64_t panel = begin;
  if (args.rows <= 2) {
    for (; panel + kFewRowsPanels <= end; panel += kFewRowsPanels) {
      walk_few_rows<Tile>(args, panel);
    }
  }
  for (; panel + kTilePanels <= end; panel += kTilePanels) {
    walk_rows<Tile, kTilePanels>(args, panel);
  }
  for (; panel < end; ++panel) {
    walk_rows<Tile, 1>(args, panel);
  }
}

}  // namespace edgellm::EDGELLM_ISA

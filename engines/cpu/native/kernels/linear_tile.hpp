// How a linear walks its output: tiles of `Rows` rows and `Panels` panels, each tile reducing over all channels in
// order. The tile's size decides only which sums are in registers together, never the order inside one sum.
#pragma once

#include "../half.hpp"
#include "../simd/simd.hpp"
#include "ask.hpp"
#include "linear.hpp"

namespace edgellm::EDGELLM_ISA {

template <class T>
inline const T* record_at(const LinearArgs& args, std::int64_t row, std::int64_t offset) {
  return reinterpret_cast<const T*>(args.x.data + row * args.x.row_bytes + offset);
}

// The outlier channels' share of a value, added to y.
#if defined(EDGELLM_AMX_SUMS)
// As a bf16 tile product computes it: over 32 channels, even and odd ones apart, with denormals flushed (the kernel's
// business). So values that come from tiles and values that do not have the same bits.
inline F32 add_outliers(const LinearArgs& args, std::int64_t row, std::int64_t panel, F32 y) {
  const auto* x = record_at<HalfIn>(args, row, args.x.outliers_at);
  const std::uint8_t* weight = args.outlier_weight + panel * args.outliers / 2 * kLineBytes;
  F32 total = zero();
  for (std::int64_t first = 0; first < args.outliers; first += 32) {
    F32 even = zero();
    F32 odd = zero();
    for (std::int64_t o = first; o < args.outliers && o < first + 32; o += 2) {
      const I32 pairs = load_i32(weight + o / 2 * kLineBytes);
      even = fma(as_f32(shift_left<16>(pairs)), set1(bf16_to_float(x[o])), even);
      odd = fma(as_f32(bit_and(pairs, set1_i32(static_cast<std::int32_t>(0xffff0000U)))), set1(bf16_to_float(x[o + 1])),
                odd);
    }
    total = add(total, add(even, odd));
  }
  return add(y, total);
}
#else
inline F32 add_outliers(const LinearArgs& args, std::int64_t row, std::int64_t panel, F32 y) {
  const auto* x = record_at<HalfIn>(args, row, args.x.outliers_at);
  const std::uint8_t* weight = args.outlier_weight + panel * args.outliers / 2 * kLineBytes;
  for (std::int64_t o = 0; o < args.outliers; o += 2) {
    y = dot_half(y, load_half_line(weight + o / 2 * kLineBytes), x + o);
  }
  return y;
}
#endif

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

// Of int4, from the sum over scaled groups: the columns' power of two, the outliers, then as above.
inline void finish_int4(const LinearArgs& args, std::int64_t row, std::int64_t panel, F32 y) {
  const F32 scaled = mul(y, load(args.column_scale + panel * kPanelColumns));
  finish(args, row, panel, add_outliers(args, row, panel, scaled));
}

// Of int8, from the sum over all channels, whose weights are too large by kInt8Offset.
inline F32 scaled_int8(const LinearArgs& args, std::int64_t row, std::int64_t panel, F32 sum) {
  const F32 y = mul(sum, set1(*record_at<float>(args, row, args.x.scale_at)));
  return mul(y, load(args.column_scale + panel * kPanelColumns));
}

inline F32 without_offset(const LinearArgs& args, std::int64_t row, int part, I32 sum) {
  return to_f32(sub(sum, set1_i32(kInt8Offset * record_at<std::int32_t>(args, row, args.x.sums_at)[part])));
}

inline void finish_int8(const LinearArgs& args, std::int64_t row, std::int64_t panel, I32 sum) {
  finish(args, row, panel, scaled_int8(args, row, panel, without_offset(args, row, 0, sum)));
}

// Of 15-bit activations in two parts.
inline void finish_int8x16(const LinearArgs& args, std::int64_t row, std::int64_t panel, I32 high, I32 low) {
  const F32 upper = without_offset(args, row, 0, high);
  const F32 lower = without_offset(args, row, 1, low);
  const F32 sum = fma(upper, set1(static_cast<float>(kInt16Base)), lower);
  finish(args, row, panel, scaled_int8(args, row, panel, sum));
}

template <class Tile, int Panels>
void walk_rows(const LinearArgs& args, std::int64_t panel) {
  std::int64_t row = 0;
  for (; row + kTileRows <= args.rows; row += kTileRows) {
    Tile::template run<kTileRows, Panels>(args, row, panel);
  }
  if (row + 2 <= args.rows) {
    Tile::template run<2, Panels>(args, row, panel);
    row += 2;
  }
  if (row < args.rows) {
    Tile::template run<1, Panels>(args, row, panel);
  }
}

// While a tile reads its weights, asks for as many that come next, in the same order: line after line of all panels,
// because a core reads more from several places at once than from one.
template <int Panels>
class Asking {
 public:
  Asking(const LinearArgs& args, const std::uint8_t* weight)
      : ahead_(args.ahead),
        distance_(args.ahead.weight - weight),
        groups_(args.group_scale != nullptr ? args.channels / args.group_size : 0),
        outlier_lines_(Panels * args.outliers / 2) {}

  // As the line at `weight` is read.
  EDGELLM_ASKS void line(const std::uint8_t* weight) const { ask_line(weight + distance_); }

  // As a group is begun: its part of what else the panels have.
  EDGELLM_ASKS void group(std::int64_t group) const {
    const std::int64_t end = (group + 1) * outlier_lines_ / groups_;
    for (std::int64_t i = group * outlier_lines_ / groups_; i < end; ++i) {
      ask_line(ahead_.outlier_weight + i * kLineBytes);
    }
    for (int p = 0; p < Panels; p += 2) ask_line(ahead_.group_scale + (group * Panels + p) * kPanelColumns);
  }

 private:
  PanelMemory ahead_;
  std::int64_t distance_;
  std::int64_t groups_, outlier_lines_;
};

// For tiles of so many rows that they do not wait for memory, or of so much weight that the cache would not keep what
// comes next.
struct NotAsking {
  NotAsking(const LinearArgs&, const std::uint8_t*) {}
  void line(const std::uint8_t*) const {}
  void group(std::int64_t) const {}
};

// One or two rows leave registers free: more panels at a time hide the latency of the sums.
inline constexpr int kFewRowsPanels = 4;

template <class Tile, int Rows, int Panels>
std::int64_t walk_few_rows(const LinearArgs& args, std::int64_t panel, std::int64_t end) {
  const bool asks = Panels * args.panel_bytes <= kAskedBytes;
  LinearArgs tile = args;
  for (; panel + Panels <= end; panel += Panels) {
    tile.ahead = panel + Panels < end ? panel_memory(args, panel + Panels) : args.ahead;
    asks ? Tile::template run<Rows, Panels, Asking<Panels>>(tile, 0, panel)
         : Tile::template run<Rows, Panels>(tile, 0, panel);
  }
  return panel;
}

template <class Tile>
void walk_panels(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  std::int64_t panel = begin;
  if (args.rows == 1) {
    panel = walk_few_rows<Tile, 1, kSingleRowPanels>(args, panel, end);
    panel = walk_few_rows<Tile, 1, kFewRowsPanels>(args, panel, end);
  } else if (args.rows == 2) {
    panel = walk_few_rows<Tile, 2, kFewRowsPanels>(args, panel, end);
  }
  for (; panel + kTilePanels <= end; panel += kTilePanels) {
    walk_rows<Tile, kTilePanels>(args, panel);
  }
  for (; panel < end; ++panel) {
    walk_rows<Tile, 1>(args, panel);
  }
}

}  // namespace edgellm::EDGELLM_ISA

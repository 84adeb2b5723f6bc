#include "linear_tile.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline F32 group_scale(const LinearArgs& args, std::int64_t panel, std::int64_t group) {
  const std::int64_t groups = args.channels / args.group_size;
  return load_f16(args.group_scale + (panel * groups + group) * kPanelColumns);
}

inline const std::uint8_t* panel_weight(const LinearArgs& args, std::int64_t panel) {
  return args.weight + panel * args.panel_bytes;
}

// Exact integer sums inside a group; groups are added in float32, in order.
struct Int4Tile {
  template <int Rows, int Panels, class Ask = NotAsking>
  static void run(const LinearArgs& args, std::int64_t row, std::int64_t panel) {
    F32 total[Rows][Panels];
    for (auto& sums : total) {
      for (F32& sum : sums) sum = zero();
    }
    const Ask ask(args, panel_weight(args, panel));
    for (std::int64_t group = 0; group < args.channels / args.group_size; ++group) {
      add_group(args, row, panel, group, ask, total);
    }
    for (int r = 0; r < Rows; ++r) {
      const F32 scale = set1(*record_at<float>(args, row + r, args.x.scale_at));
      for (int p = 0; p < Panels; ++p) finish_int4(args, row + r, panel + p, mul(total[r][p], scale));
    }
  }

  template <int Rows, int Panels, class Ask>
  static void add_group(const LinearArgs& args, std::int64_t row, std::int64_t panel, std::int64_t group,
                        const Ask& ask, F32 (&total)[Rows][Panels]) {
    ask.group(group);
    const std::int8_t* x[Rows];
    I32 sum[Rows][Panels];
    for (int r = 0; r < Rows; ++r) {
      x[r] = record_at<std::int8_t>(args, row + r, 0);
      const std::int32_t x_sum = record_at<std::int32_t>(args, row + r, args.x.sums_at)[group];
      for (int p = 0; p < Panels; ++p) sum[r][p] = set1_i32(-kInt4Offset * x_sum);
    }
    for (std::int64_t k = group * args.group_size; k < (group + 1) * args.group_size; k += 8) {
      for (int p = 0; p < Panels; ++p) {
        const std::uint8_t* weight = panel_weight(args, panel + p) + k / 8 * kLineBytes;
        ask.line(weight);
        const Int4Line line = load_int4_line(weight);
        for (int r = 0; r < Rows; ++r) sum[r][p] = dot_int4(sum[r][p], line, x[r] + k);
      }
    }
    for (int p = 0; p < Panels; ++p) {
      const F32 scale = group_scale(args, panel + p, group);
      for (int r = 0; r < Rows; ++r) total[r][p] = fma(to_f32(sum[r][p]), scale, total[r][p]);
    }
  }
};

template <int Shift>
inline F32 nibble_weight(I32 words) {
  return to_f32(sub(bit_and(shift_right<Shift>(words), set1_i32(15)), set1_i32(8)));
}

// Weights widened to float32, activations left in float32.
struct Int4FloatTile {
  template <int Rows, int Panels, class Ask = NotAsking>
  static void run(const LinearArgs& args, std::int64_t row, std::int64_t panel) {
    F32 total[Rows][Panels];
    for (auto& sums : total) {
      for (F32& sum : sums) sum = zero();
    }
    for (std::int64_t group = 0; group < args.channels / args.group_size; ++group) {
      add_group(args, row, panel, group, total);
    }
    for (int r = 0; r < Rows; ++r) {
      for (int p = 0; p < Panels; ++p) finish_int4(args, row + r, panel + p, total[r][p]);
    }
  }

  template <int Rows, int Panels>
  static void add_group(const LinearArgs& args, std::int64_t row, std::int64_t panel, std::int64_t group,
                        F32 (&total)[Rows][Panels]) {
    F32 sum[Rows][Panels];
    for (auto& sums : sum) {
      for (F32& part : sums) part = zero();
    }
    for (std::int64_t k = group * args.group_size; k < (group + 1) * args.group_size; k += 8) {
      for (int p = 0; p < Panels; ++p) {
        add_line(args, row, p, k, load_i32(panel_weight(args, panel + p) + k / 8 * kLineBytes), sum);
      }
    }
    for (int p = 0; p < Panels; ++p) {
      const F32 scale = group_scale(args, panel + p, group);
      for (int r = 0; r < Rows; ++r) total[r][p] = fma(sum[r][p], scale, total[r][p]);
    }
  }

  // Adds the line's eight channels to the sums of panel `p`.
  template <int Rows, int Panels>
  static void add_line(const LinearArgs& args, std::int64_t row, int p, std::int64_t k, I32 words,
                       F32 (&sum)[Rows][Panels]) {
    const F32 w[8] = {nibble_weight<0>(words),  nibble_weight<8>(words), nibble_weight<16>(words),
                      nibble_weight<24>(words), nibble_weight<4>(words), nibble_weight<12>(words),
                      nibble_weight<20>(words), nibble_weight<28>(words)};
    for (int r = 0; r < Rows; ++r) {
      const float* x = record_at<float>(args, row + r, 0) + k;
      for (int j = 0; j < 8; ++j) sum[r][p] = fma(w[j], set1(x[j]), sum[r][p]);
    }
  }
};

}  // namespace

void linear_int4(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  walk_panels<Int4Tile>(args, begin, end);
}

void linear_int4_float(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  walk_panels<Int4FloatTile>(args, begin, end);
}

}  // namespace edgellm::EDGELLM_ISA

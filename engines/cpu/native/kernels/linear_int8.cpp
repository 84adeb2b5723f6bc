#include "linear_tile.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline F32 column_scale(const LinearArgs& args, std::int64_t panel) {
  return load(args.column_scale + panel * kPanelColumns);
}

// Integer sums over all channels, then one scaling per value.
struct Int8Tile {
  template <int Rows, int Panels>
  static void run(const LinearArgs& args, std::int64_t row, std::int64_t panel) {
    const std::int64_t panel_bytes = args.channels / 4 * kLineBytes;
    const std::uint8_t* weight = args.weight + panel * panel_bytes;
    const std::int8_t* x[Rows];
    I32 sum[Rows][Panels];
    for (int r = 0; r < Rows; ++r) {
      x[r] = record_at<std::int8_t>(args, row + r, 0);
      for (int p = 0; p < Panels; ++p) sum[r][p] = set1_i32(0);
    }
    for (std::int64_t k = 0; k < args.channels; k += 4) {
      for (int p = 0; p < Panels; ++p) {
        const Int8Line line = load_int8_line(weight + p * panel_bytes + k / 4 * kLineBytes);
        for (int r = 0; r < Rows; ++r) sum[r][p] = dot_int8(sum[r][p], line, x[r] + k);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      const I32 offset = set1_i32(kInt8Offset * *record_at<std::int32_t>(args, row + r, args.x.sums_at));
      const F32 scale = set1(*record_at<float>(args, row + r, args.x.scale_at));
      for (int p = 0; p < Panels; ++p) {
        const F32 y = mul(to_f32(sub(sum[r][p], offset)), scale);
        finish(args, row + r, panel + p, mul(y, column_scale(args, panel + p)));
      }
    }
  }
};

template <int Channel>
inline F32 channel_weight(I32 words) {
  return to_f32(sub(bit_and(shift_right<8 * Channel>(words), set1_i32(255)), set1_i32(128)));
}

// Weights widened to float32, activations left in float32.
struct Int8FloatTile {
  template <int Rows, int Panels>
  static void run(const LinearArgs& args, std::int64_t row, std::int64_t panel) {
    const std::int64_t panel_bytes = args.channels / 4 * kLineBytes;
    const std::uint8_t* weight = args.weight + panel * panel_bytes;
    const float* x[Rows];
    F32 sum[Rows][Panels];
    for (int r = 0; r < Rows; ++r) {
      x[r] = record_at<float>(args, row + r, 0);
      for (int p = 0; p < Panels; ++p) sum[r][p] = zero();
    }
    for (std::int64_t k = 0; k < args.channels; k += 4) {
      for (int p = 0; p < Panels; ++p) {
        const I32 words = load_i32(weight + p * panel_bytes + k / 4 * kLineBytes);
        const F32 w[4] = {channel_weight<0>(words), channel_weight<1>(words), channel_weight<2>(words),
                          channel_weight<3>(words)};
        for (int r = 0; r < Rows; ++r) {
          for (int j = 0; j < 4; ++j) sum[r][p] = fma(w[j], set1(x[r][k + j]), sum[r][p]);
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int p = 0; p < Panels; ++p) {
        finish(args, row + r, panel + p, mul(sum[r][p], column_scale(args, panel + p)));
      }
    }
  }
};

}  // namespace

void linear_int8(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  walk_panels<Int8Tile>(args, begin, end);
}

void linear_int8_float(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  walk_panels<Int8FloatTile>(args, begin, end);
}

}  // namespace edgellm::EDGELLM_ISA

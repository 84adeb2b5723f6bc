#include "linear_tile.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

struct HalfTile {
  template <int Rows, int Panels, class Ask = NotAsking>
  static void run(const LinearArgs& args, std::int64_t row, std::int64_t panel) {
    const std::uint8_t* weight = args.weight + panel * args.panel_bytes;
    const HalfIn* x[Rows];
    F32 sum[Rows][Panels];
    for (int r = 0; r < Rows; ++r) {
      x[r] = record_at<HalfIn>(args, row + r, 0);
      for (int p = 0; p < Panels; ++p) sum[r][p] = zero();
    }
    for (std::int64_t k = 0; k < args.channels; k += 2) {
      for (int p = 0; p < Panels; ++p) {
        const HalfLine line = load_half_line(weight + p * args.panel_bytes + k / 2 * kLineBytes);
        for (int r = 0; r < Rows; ++r) sum[r][p] = dot_half(sum[r][p], line, x[r] + k);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int p = 0; p < Panels; ++p) finish(args, row + r, panel + p, sum[r][p]);
    }
  }
};

}  // namespace

void linear_half(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  walk_panels<HalfTile>(args, begin, end);
}

}  // namespace edgellm::EDGELLM_ISA

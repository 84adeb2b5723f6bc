// linear_half on AMX tiles. The rounding of a sum is the tile unit's own, other than AVX-512's, so one row goes through
// tiles too: then every row gets the same bits in any company. Channels are taken in parts, so that the weights of many
// panels stay in the cache while rows pass by; a sum rests in `out` between two parts, unrounded.
#include "amx_product.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline constexpr std::int64_t kTileChannels = 32;
inline constexpr std::int64_t kPartSteps = 64;  // 2048 channels
inline constexpr int kBlockRows = 2 * kTileHeight;

struct Bf16Product {
  static void run() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

// Steps [first, first + count) of all channels.
struct Part {
  std::int64_t first, count, all;

  bool starts() const { return first == 0; }
  bool ends() const { return first + count == all; }
};

// Up to 32 rows of two panels; where there are no more than 16 rows, or is no second panel, the first ones twice.
struct Block {
  const LinearArgs& args;
  std::int64_t row, panel;
  int height, panels;

  TileOperands operands(const Part& part) const {
    const std::int64_t panel_bytes = part.all * kTileBytes;
    const std::uint8_t* x = args.x.data + row * args.x.row_bytes + part.first * kLineBytes;
    const std::uint8_t* weight = args.weight + panel * panel_bytes + part.first * kTileBytes;
    return {{x, height > kTileHeight ? x + kTileHeight * args.x.row_bytes : x},
            {weight, panels > 1 ? weight + panel_bytes : weight},
            args.x.row_bytes,
            part.count};
  }

  // body(row of `out`, panel, sums of that row and panel).
  template <class Body>
  void each(TileSums& sums, const Body& body) const {
    for (int r = 0; r < height; ++r) {
      for (int p = 0; p < panels; ++p) body(row + r, panel + p, sums.row(r / kTileHeight, p, r % kTileHeight));
    }
  }
};

void run_block(const Block& block, const Part& part) {
  const LinearArgs& args = block.args;
  const auto out = [&](std::int64_t row, std::int64_t panel) {
    return args.out.data + row * args.out.stride + panel * kPanelColumns;
  };
  const auto columns = [&](std::int64_t panel) { return static_cast<int>(args.columns - panel * kPanelColumns); };
  TileSums sums;
  if (!part.starts()) {
    block.each(sums, [&](std::int64_t row, std::int64_t panel, float* sum) {
      store(sum, load_n(out(row, panel), columns(panel)));
    });
  }
  multiply<Bf16Product>(block.operands(part), part.starts(), sums);
  block.each(sums, [&](std::int64_t row, std::int64_t panel, const float* sum) {
    if (part.ends()) {
      finish(args, row, panel, load(sum));
    } else {
      store_n(out(row, panel), load(sum), columns(panel));
    }
  });
}

void run_part(const LinearArgs& args, const Part& part, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = 0; row < args.rows; row += kBlockRows) {
    const int height = static_cast<int>(std::min<std::int64_t>(args.rows - row, kBlockRows));
    const int first = std::min(height, kTileHeight);
    configure_product(first, height > kTileHeight ? height - kTileHeight : first);
    for (std::int64_t panel = begin; panel < end; panel += 2) {
      run_block({args, row, panel, height, static_cast<int>(std::min<std::int64_t>(end - panel, 2))}, part);
    }
  }
}

}  // namespace

void linear_half(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t steps = args.channels / kTileChannels;
  // Few rows read each weight once: no cache helps, and memory is read best in one go.
  const std::int64_t part_steps = args.rows <= kBlockRows ? steps : kPartSteps;
  const std::int64_t panels = panels_in_cache(std::min(steps, part_steps) * kTileBytes);
  for (std::int64_t panel = begin; panel < end; panel += panels) {
    for (std::int64_t step = 0; step < steps; step += part_steps) {
      const Part part{step, std::min(part_steps, steps - step), steps};
      run_part(args, part, panel, std::min(end, panel + panels));
    }
  }
  _tile_release();
}

}  // namespace edgellm::EDGELLM_ISA

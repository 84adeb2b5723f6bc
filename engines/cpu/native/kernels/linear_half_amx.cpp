// linear_half on AMX tiles. The rounding of a sum is the tile unit's own, other than AVX-512's, so one row goes through
// tiles too: then every row gets the same bits in any company. Some rows' activations stay in the core's own cache
// while the panels of weights pass by, each fetched while the one before is multiplied. Channels are taken in parts for
// that; a sum rests in `out` between two parts, unrounded.
#include "amx_half.hpp"
#include "amx_product.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

inline constexpr std::int64_t kPartSteps = 64;  // 2048 channels
inline constexpr int kBlockRows = 2 * kTileHeight;
inline constexpr std::int64_t kActivationBytes = 1 << 20;  // of the rows that stay in the cache
inline constexpr std::int64_t kStepsAhead = 4;

// Steps [first, first + count) of all channels.
struct Part {
  std::int64_t first, count, all;

  bool starts() const { return first == 0; }
  bool ends() const { return first + count == all; }
};

// Two panels that later blocks will read, fetched from afar some lines per step.
struct PanelsAhead {
  const std::uint8_t* data[2];
  std::int64_t lines, lines_per_step;  // of each panel

  void step() {
    for (std::int64_t i = std::min(lines, lines_per_step); i > 0; --i, --lines) {
      for (auto& line : data) {
        _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
        line += kLineBytes;
      }
    }
  }
};

// Tiles of the two halves of a block's rows, and of its two panels, from some step on.
struct HalfOperands {
  const std::uint8_t* x[2];
  std::int64_t x_bytes[2];  // of a tile
  const std::uint8_t* weight[2];

  void skip(std::int64_t steps) {
    for (int i = 0; i < 2; ++i) {
      x[i] += steps * x_bytes[i];
      weight[i] += steps * kTileBytes;
    }
  }
};

inline void fetch_tile(const std::uint8_t* tile) {
#pragma GCC unroll 16
  for (int line = 0; line < kTileHeight; ++line) {
    _mm_prefetch(reinterpret_cast<const char*>(tile + line * kLineBytes), _MM_HINT_T0);
  }
}

// Sums 0 to 3 += x . weight. A tile is cleared after its last use: where another hardware thread shares the core, a
// load into a tile else waits for what the tile held. Fetches stand between the products, which leave them the time.
inline void multiply_steps(HalfOperands& now, HalfOperands fetched, std::int64_t steps, PanelsAhead& ahead) {
  for (; steps > 0; --steps) {
    _tile_loadd(4, now.x[0], kLineBytes);
    _tile_loadd(6, now.weight[0], kLineBytes);
    _tile_loadd(7, now.weight[1], kLineBytes);
    _tile_loadd(5, now.x[1], kLineBytes);
    fetch_tile(fetched.x[0]);
    _tile_dpbf16ps(0, 4, 6);
    fetch_tile(fetched.weight[0]);
    _tile_dpbf16ps(1, 4, 7);
    _tile_zero(4);
    fetch_tile(fetched.weight[1]);
    _tile_dpbf16ps(2, 5, 6);
    _tile_zero(6);
    fetch_tile(fetched.x[1]);
    _tile_dpbf16ps(3, 5, 7);
    _tile_zero(7);
    _tile_zero(5);
    ahead.step();
    now.skip(1);
    fetched.skip(1);
  }
}

// Over all `steps` of a block, and fetches the first ones of the next.
inline void multiply_half(HalfOperands now, const HalfOperands& next, std::int64_t steps, PanelsAhead& ahead) {
  const std::int64_t last = std::min(steps, kStepsAhead);
  HalfOperands fetched = now;
  fetched.skip(kStepsAhead);
  multiply_steps(now, fetched, steps - last, ahead);
  multiply_steps(now, next, last, ahead);
}

inline void start_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load_sums(TileSums& sums) {
  _tile_loadd(0, sums.of[0], kLineBytes);
  _tile_loadd(1, sums.of[1], kLineBytes);
  _tile_loadd(2, sums.of[2], kLineBytes);
  _tile_loadd(3, sums.of[3], kLineBytes);
}

inline void store_sums(TileSums& sums) {
  _tile_stored(0, sums.of[0], kLineBytes);
  _tile_stored(1, sums.of[1], kLineBytes);
  _tile_stored(2, sums.of[2], kLineBytes);
  _tile_stored(3, sums.of[3], kLineBytes);
}

// Up to 32 rows of two panels; where there are no more than 16 rows, or is no second panel, the first ones twice.
struct Block {
  const LinearArgs& args;
  std::int64_t row, panel;
  int height, panels;

  HalfOperands operands(const Part& part) const {
    const HalfTiles first(args.x, row, args.rows, args.channels);
    const HalfTiles second(args.x, height > kTileHeight ? row + kTileHeight : row, args.rows, args.channels);
    const std::uint8_t* weight = args.weight + (panel * part.all + part.first) * kTileBytes;
    return {{first.line(part.first, 0), second.line(part.first, 0)},
            {first.tile_bytes(), second.tile_bytes()},
            {weight, panels > 1 ? weight + part.all * kTileBytes : weight}};
  }

  // body(row of `out`, panel, sums of that row and panel).
  template <class Body>
  void each(TileSums& sums, const Body& body) const {
    for (int r = 0; r < height; ++r) {
      for (int p = 0; p < panels; ++p) body(row + r, panel + p, sums.row(r / kTileHeight, p, r % kTileHeight));
    }
  }
};

void run_block(const Block& block, const Block& next, const Part& part, PanelsAhead& ahead) {
  const LinearArgs& args = block.args;
  const auto out = [&](std::int64_t row, std::int64_t panel) {
    return args.out.data + row * args.out.stride + panel * kPanelColumns;
  };
  const auto columns = [&](std::int64_t panel) { return static_cast<int>(args.columns - panel * kPanelColumns); };
  TileSums sums;
  if (part.starts()) {
    start_sums();
  } else {
    block.each(sums, [&](std::int64_t row, std::int64_t panel, float* sum) {
      store(sum, load_n(out(row, panel), columns(panel)));
    });
    load_sums(sums);
  }
  multiply_half(block.operands(part), next.operands(part), part.count, ahead);
  store_sums(sums);
  block.each(sums, [&](std::int64_t row, std::int64_t panel, const float* sum) {
    if (part.ends()) {
      finish(args, row, panel, load(sum));
    } else {
      store_n(out(row, panel), load(sum), columns(panel));
    }
  });
}

struct Range {
  std::int64_t begin, end;
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

Block block_at(const LinearArgs& args, std::int64_t row, std::int64_t row_end, std::int64_t panel, std::int64_t end) {
  return {args, row, panel, static_cast<int>(std::min<std::int64_t>(row_end - row, kBlockRows)),
          static_cast<int>(std::min<std::int64_t>(end - panel, 2))};
}

// The block that is taken after the one at `row` and `panel`; the same one after the last.
Block block_after(const LinearArgs& args, std::int64_t row, std::int64_t panel, Range rows, Range panels) {
  if (row + kBlockRows < rows.end) return block_at(args, row + kBlockRows, rows.end, panel, panels.end);
  return block_at(args, rows.begin, rows.end, panel + 2 < panels.end ? panel + 2 : panel, panels.end);
}

// The two panels from `panel` on, shared out among the blocks of rows that pass by before.
PanelsAhead panels_ahead(const LinearArgs& args, const Part& part, Range rows, std::int64_t panel, std::int64_t end) {
  const std::int64_t panel_bytes = part.all * kTileBytes;
  const std::uint8_t* first = args.weight + panel * panel_bytes + part.first * kTileBytes;
  const std::int64_t blocks = ceil_div(rows.end - rows.begin, kBlockRows);
  return {{first, panel + 1 < end ? first + panel_bytes : first},
          panel < end ? part.count * kTileHeight : 0,
          ceil_div(kTileHeight, blocks)};
}

void run_part(const LinearArgs& args, const Part& part, Range rows, Range panels) {
  int configured = 0;
  for (std::int64_t panel = panels.begin; panel < panels.end; panel += 2) {
    PanelsAhead ahead = panels_ahead(args, part, rows, panel + 2, panels.end);
    for (std::int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
      const Block block = block_at(args, row, rows.end, panel, panels.end);
      if (block.height != configured) {
        configured = block.height;
        const int first = std::min(configured, kTileHeight);
        configure_product(first, configured > kTileHeight ? configured - kTileHeight : first);
      }
      run_block(block, block_after(args, row, panel, rows, panels), part, ahead);
    }
  }
}

}  // namespace

void linear_half(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t steps = args.channels / kTileChannels;
  // Few rows read each weight once: no cache helps, and memory is read best in one go.
  const std::int64_t part_steps = std::min(steps, args.rows <= kBlockRows ? steps : kPartSteps);
  const std::int64_t fitting = kActivationBytes / (part_steps * kTileRowBytes) / kBlockRows * kBlockRows;
  const std::int64_t chunk = std::max<std::int64_t>(kBlockRows, fitting);
  for (std::int64_t row = 0; row < args.rows; row += chunk) {
    for (std::int64_t step = 0; step < steps; step += part_steps) {
      const Part part{step, std::min(part_steps, steps - step), steps};
      run_part(args, part, {row, std::min(args.rows, row + chunk)}, {begin, end});
    }
  }
  _tile_release();
}

}  // namespace edgellm::EDGELLM_ISA

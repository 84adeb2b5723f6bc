// Parts of int4 panels, small enough to stay unpacked in the core's first cache, and how they are unpacked.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "../simd/simd.hpp"
#include "linear.hpp"

namespace edgellm::EDGELLM_ISA {

inline constexpr std::int64_t kPartChannels = 640;  // of a panel: 10 KiB unpacked
inline constexpr std::int64_t kPanels = 4;          // that take turns part by part, so that rows stay cached
inline constexpr float kUnpackedScale = 16.0F;      // of unpacked weights, whose four bits are the upper ones

// Groups [first, first + count) of a panel.
struct Part {
  std::int64_t panel, first, count;
};

// All parts of panels [begin, end) in the order in which they are multiplied.
struct Parts {
  std::int64_t begin, end, groups, per_panel, part_groups;

  Parts(const LinearArgs& args, std::int64_t first, std::int64_t last)
      : begin(first), end(last), groups(args.channels / args.group_size) {
    const std::int64_t most = kPartChannels / args.group_size;
    per_panel = (groups + most - 1) / most;
    part_groups = (groups + per_panel - 1) / per_panel;
    per_panel = (groups + part_groups - 1) / part_groups;
  }
  std::int64_t count() const { return (end - begin) * per_panel; }
  // The last one where there are not as many.
  Part at(std::int64_t index) const {
    index = std::min(index, count() - 1);
    const std::int64_t panel = begin + index / (kPanels * per_panel) * kPanels;
    const std::int64_t panels = std::min(kPanels, end - panel);
    const std::int64_t rest = index % (kPanels * per_panel);
    const std::int64_t first = rest / panels * part_groups;
    return {panel + rest % panels, first, std::min(part_groups, groups - first)};
  }
};

// A part's weights as signed int8 [channels / 4, 16 columns, 4], times 16.
struct Unpacked {
  alignas(64) std::int8_t data[kPartChannels * kPanelColumns];
};

// Unpacks a part line by line, and fetches from memory as much of another.
struct Unpacking {
  const std::uint8_t* from;
  const std::uint8_t* fetched;
  std::int8_t* to;
  std::int64_t lines;

  Unpacking(const LinearArgs& args, const Part& part, const Part& ahead, Unpacked& out)
      : from(lines_of(args, part)),
        fetched(lines_of(args, ahead)),
        to(out.data),
        lines(part.count * args.group_size / 8) {}

  void run(std::int64_t count) {
    const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0));
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    constexpr int and_xor = 0x6a;  // (a & b) ^ c
    for (std::int64_t i = std::min(count, lines); i > 0; --i, --lines) {
      const __m512i line = _mm512_loadu_si512(from);
      _mm_prefetch(reinterpret_cast<const char*>(fetched), _MM_HINT_T1);
      _mm512_store_si512(to, _mm512_ternarylogic_epi32(_mm512_slli_epi32(line, 4), upper, sign, and_xor));
      _mm512_store_si512(to + kLineBytes, _mm512_ternarylogic_epi32(line, upper, sign, and_xor));
      from += kLineBytes;
      fetched += kLineBytes;
      to += 2 * kLineBytes;
    }
  }

 private:
  static const std::uint8_t* lines_of(const LinearArgs& args, const Part& part) {
    return args.weight + (part.panel * args.channels + part.first * args.group_size) / 8 * kLineBytes;
  }
};

}  // namespace edgellm::EDGELLM_ISA

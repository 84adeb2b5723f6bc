// Asking for memory before it is read.
#pragma once

#include <cstdint>

namespace edgellm {

// A function that does nothing but ask must be part of its caller: the compiler takes it for one without effect and
// drops calls of it.
#define EDGELLM_ASKS [[gnu::always_inline]]

// One line, into the core's second cache. Any address will do.
EDGELLM_ASKS inline void ask_line(const void* at) { __builtin_prefetch(at, 0, 2); }

// Elements [begin, end) of the rows of one of kRows / 4 fours, line by line in turn. A core reads more from several
// pages at once, so the four lie far apart, unless rows are so short that it makes no difference: then they are
// neighbours.
template <int kRows, class Value>
EDGELLM_ASKS inline void ask_four(const Value* rows, std::int64_t stride, int four, std::int64_t begin,
                                  std::int64_t end) {
  constexpr std::int64_t line = 64 / sizeof(Value);
  constexpr std::int64_t long_row = 512 / sizeof(Value);
  const bool are_far = stride >= long_row;
  const Value* first = rows + (are_far ? four : 4 * four) * stride;
  const std::int64_t apart = (are_far ? kRows / 4 : 1) * stride;
  for (std::int64_t i = begin; i < end; i += line) {
    for (int row = 0; row < 4; ++row) ask_line(first + row * apart + i);
  }
}

}  // namespace edgellm

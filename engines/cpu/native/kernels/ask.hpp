// Asking for memory before it is read.
#pragma once

namespace edgellm {

// A function that does nothing but ask must be part of its caller: the compiler takes it for one without effect and
// drops calls of it.
#define EDGELLM_ASKS [[gnu::always_inline]]

// One line, into the core's second cache. Any address will do.
EDGELLM_ASKS inline void ask_line(const void* at) { __builtin_prefetch(at, 0, 2); }

}  // namespace edgellm

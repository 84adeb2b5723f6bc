#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// Unit: row. out = act(x), or act(x) * up where up.data is not null.
struct ActivateArgs {
  Rows x, up, out;
  std::int64_t size;
};

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

void silu(const ActivateArgs& args, std::int64_t begin, std::int64_t end);
void gelu(const ActivateArgs& args, std::int64_t begin, std::int64_t end);
void gelu_tanh(const ActivateArgs& args, std::int64_t begin, std::int64_t end);

}  // namespace edgellm::EDGELLM_ISA
#endif

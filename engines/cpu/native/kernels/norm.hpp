#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// Unit: row.
struct NormArgs {
  Rows x, out;
  const float* weight;  // [size]
  const float* bias;    // [size] or null; layer norm only
  std::int64_t size;
  float eps;
};

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

void norm_rms(const NormArgs& args, std::int64_t begin, std::int64_t end);
void norm_layer(const NormArgs& args, std::int64_t begin, std::int64_t end);

}  // namespace edgellm::EDGELLM_ISA
#endif

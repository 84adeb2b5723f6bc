#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// Unit: row. out = a + b.
struct AddArgs {
  Rows a, b, out;
  std::int64_t size;
};

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

void add_rows(const AddArgs& args, std::int64_t begin, std::int64_t end);

}  // namespace edgellm::EDGELLM_ISA
#endif

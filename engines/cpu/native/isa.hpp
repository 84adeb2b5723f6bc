// Which instruction sets this build has kernels for, and which of them this machine can run.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "kernels/table.hpp"

namespace edgellm {

// Best first; "portable" is always last.
std::vector<std::string> available_isas();

// Kernels of one of `available_isas()`, or of "reference", the plain twins that tests compare with. Throws
// std::invalid_argument for any other name.
const KernelTable& kernels_of(std::string_view isa);

}  // namespace edgellm

#include "add.hpp"

namespace edgellm::EDGELLM_ISA {

void add_rows(const AddArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t i = 0; i < args.size; ++i) {
      args.out.data[row * args.out.stride + i] =
          args.a.data[row * args.a.stride + i] + args.b.data[row * args.b.stride + i];
    }
  }
}

}  // namespace edgellm::EDGELLM_ISA

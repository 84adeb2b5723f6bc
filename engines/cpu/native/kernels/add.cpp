#include "add.hpp"

#include "../simd/simd.hpp"

namespace edgellm::EDGELLM_ISA {

void add_rows(const AddArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* a = args.a.data + row * args.a.stride;
    const float* b = args.b.data + row * args.b.stride;
    float* out = args.out.data + row * args.out.stride;
    for (std::int64_t i = 0; i < args.size; i += kLanes) {
      const int n = static_cast<int>(args.size - i);
      store_n(out + i, add(load_n(a + i, n), load_n(b + i, n)), n);
    }
  }
}

}  // namespace edgellm::EDGELLM_ISA

// Float memory on a cache line's boundary, whose pages are taken from the system when first touched.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace edgellm {

struct FreeAligned {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float[], FreeAligned>;

inline AlignedFloats aligned_floats(std::int64_t count) {
  return AlignedFloats(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{64})));
}

}  // namespace edgellm

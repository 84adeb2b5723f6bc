#include "norm.hpp"

#include <cmath>

#include "../simd/simd.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

float sum(const float* x, std::int64_t size) {
  F32 total = zero();
  for (std::int64_t i = 0; i < size; i += kLanes) {
    total = add(total, load_n(x + i, static_cast<int>(size - i)));
  }
  return reduce_add(total);
}

// Sum of (x - center)^2.
float squares(const float* x, std::int64_t size, float center) {
  F32 total = zero();
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const int n = static_cast<int>(size - i);
    const F32 centered = first_lanes(sub(load_n(x + i, n), set1(center)), zero(), n);
    total = fma(centered, centered, total);
  }
  return reduce_add(total);
}

}  // namespace

void norm_rms(const NormArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = args.x.data + row * args.x.stride;
    float* out = args.out.data + row * args.out.stride;
    const float mean = squares(x, args.size, 0.0F) / static_cast<float>(args.size);
    const F32 factor = set1(1.0F / std::sqrt(mean + args.eps));
    for (std::int64_t i = 0; i < args.size; i += kLanes) {
      const int n = static_cast<int>(args.size - i);
      store_n(out + i, mul(mul(load_n(x + i, n), factor), load_n(args.weight + i, n)), n);
    }
  }
}

void norm_layer(const NormArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = args.x.data + row * args.x.stride;
    float* out = args.out.data + row * args.out.stride;
    const float mean = sum(x, args.size) / static_cast<float>(args.size);
    const float variance = squares(x, args.size, mean) / static_cast<float>(args.size);
    const F32 factor = set1(1.0F / std::sqrt(variance + args.eps));
    for (std::int64_t i = 0; i < args.size; i += kLanes) {
      const int n = static_cast<int>(args.size - i);
      const F32 bias = args.bias != nullptr ? load_n(args.bias + i, n) : zero();
      const F32 normed = mul(sub(load_n(x + i, n), set1(mean)), factor);
      store_n(out + i, add(mul(normed, load_n(args.weight + i, n)), bias), n);
    }
  }
}

}  // namespace edgellm::EDGELLM_ISA

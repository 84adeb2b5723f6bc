#include "activate.hpp"

#include "../simd/math.hpp"
#include "../simd/simd.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

struct Silu {
  F32 operator()(F32 x) const { return mul(x, sigmoid(x)); }
};

// x * Phi(x). Phi(x) = erfc(|x| / sqrt 2) / 2 for negative x, and 1 minus that else: max(x, 0) - |x| * erfc / 2.
struct Gelu {
  F32 operator()(F32 x) const {
    const F32 tail = mul(set1(0.5F), erfc_abs(mul(x, set1(0.707106781F))));
    return sub(max(x, zero()), mul(abs(x), tail));
  }
};

// x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  F32 operator()(F32 x) const {
    const F32 cubic = fma(mul(mul(x, x), x), set1(0.044715F), x);
    return mul(x, sigmoid(mul(cubic, set1(1.59576912F))));
  }
};

template <class Act>
void activate(const ActivateArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = args.x.data + row * args.x.stride;
    const float* up = args.up.data != nullptr ? args.up.data + row * args.up.stride : nullptr;
    float* out = args.out.data + row * args.out.stride;
    for (std::int64_t i = 0; i < args.size; i += kLanes) {
      const int n = static_cast<int>(args.size - i);
      const F32 value = Act{}(load_n(x + i, n));
      store_n(out + i, up != nullptr ? mul(value, load_n(up + i, n)) : value, n);
    }
  }
}

}  // namespace

void silu(const ActivateArgs& args, std::int64_t begin, std::int64_t end) { activate<Silu>(args, begin, end); }
void gelu(const ActivateArgs& args, std::int64_t begin, std::int64_t end) { activate<Gelu>(args, begin, end); }
void gelu_tanh(const ActivateArgs& args, std::int64_t begin, std::int64_t end) { activate<GeluTanh>(args, begin, end); }

}  // namespace edgellm::EDGELLM_ISA

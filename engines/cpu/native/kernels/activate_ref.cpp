#include <cmath>

#include "activate.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

template <class Act>
void activate(const ActivateArgs& args, std::int64_t begin, std::int64_t end, Act act) {
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t i = 0; i < args.size; ++i) {
      const double up = args.up.data != nullptr ? args.up.data[row * args.up.stride + i] : 1.0;
      args.out.data[row * args.out.stride + i] = static_cast<float>(act(args.x.data[row * args.x.stride + i]) * up);
    }
  }
}

}  // namespace

void silu(const ActivateArgs& args, std::int64_t begin, std::int64_t end) {
  activate(args, begin, end, [](double x) { return x / (1.0 + std::exp(-x)); });
}

void gelu(const ActivateArgs& args, std::int64_t begin, std::int64_t end) {
  activate(args, begin, end, [](double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); });
}

void gelu_tanh(const ActivateArgs& args, std::int64_t begin, std::int64_t end) {
  activate(args, begin, end, [](double x) {
    const double pi = std::acos(-1.0);
    return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / pi) * (x + 0.044715 * x * x * x)));
  });
}

}  // namespace edgellm::EDGELLM_ISA

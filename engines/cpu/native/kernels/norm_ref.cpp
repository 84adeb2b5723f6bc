#include <cmath>

#include "norm.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

double mean_square(const float* x, std::int64_t size, double center) {
  double total = 0.0;
  for (std::int64_t i = 0; i < size; ++i) total += (x[i] - center) * (x[i] - center);
  return total / static_cast<double>(size);
}

void normalize(const NormArgs& args, std::int64_t row, double center, const float* bias) {
  const float* x = args.x.data + row * args.x.stride;
  const double factor = 1.0 / std::sqrt(mean_square(x, args.size, center) + static_cast<double>(args.eps));
  for (std::int64_t i = 0; i < args.size; ++i) {
    const double normed = (x[i] - center) * factor * args.weight[i];
    args.out.data[row * args.out.stride + i] = static_cast<float>(normed + (bias != nullptr ? bias[i] : 0.0));
  }
}

}  // namespace

void norm_rms(const NormArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) normalize(args, row, 0.0, nullptr);
}

void norm_layer(const NormArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    double mean = 0.0;
    for (std::int64_t i = 0; i < args.size; ++i) mean += args.x.data[row * args.x.stride + i];
    normalize(args, row, mean / static_cast<double>(args.size), args.bias);
  }
}

}  // namespace edgellm::EDGELLM_ISA

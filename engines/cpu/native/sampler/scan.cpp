#include "scan.hpp"

#include <bit>
#include <limits>

// One body per vector width; the loader takes the widest that the processor has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define EDGELLM_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EDGELLM_WIDEST
#endif

namespace edgellm::sampler {
namespace {

constexpr int32_t kMagnitude = 0x7FFFFFFF;  // all bits but the sign
constexpr int32_t kInfinity = 0x7F800000;

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2High = 0.693359375F;
constexpr float kLn2Low = -2.12194440e-4F;
constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23: adding it rounds to a whole number
constexpr float kSmallestExponent = -87.0F;

inline int32_t weight_of(float exponent) {
  const float x = exponent > kSmallestExponent ? exponent : kSmallestExponent;
  const float power = (x * kLog2E + kRounder) - kRounder;
  float r = x - power * kLn2High;
  r = r - power * kLn2Low;
  float y = 1.9875691500e-4F;
  y = y * r + 1.3981999507e-3F;
  y = y * r + 8.3334519073e-3F;
  y = y * r + 4.1665795894e-2F;
  y = y * r + 1.6666665459e-1F;
  y = y * r + 5.0000001201e-1F;
  y = y * (r * r) + r + 1.0F;
  const float scale = std::bit_cast<float>((static_cast<int32_t>(power) + 127 + 30) << 23);
  return static_cast<int32_t>(y * scale + 0.5F);
}

}  // namespace

// On the floats' bits, since compilers vectorise reductions of integers only (floats would need another order of
// NaN).
EDGELLM_WIDEST Peak find_peak(std::span<const float> logits) {
  int32_t largest = std::numeric_limits<int32_t>::min();
  int32_t has_nan = 0;
  for (const float logit : logits) {
    const auto bits = std::bit_cast<int32_t>(logit);
    const int32_t key = bits ^ ((bits >> 31) & kMagnitude);
    largest = key > largest ? key : largest;
    has_nan |= static_cast<int32_t>((bits & kMagnitude) > kInfinity);
  }
  return {std::bit_cast<float>(largest ^ ((largest >> 31) & kMagnitude)), has_nan != 0};
}

EDGELLM_WIDEST void compute_weights(std::span<const float> logits, float max, float inverse_temperature,
                                    std::span<int32_t> weights) {
  for (size_t i = 0; i < logits.size(); ++i) {
    weights[i] = weight_of((logits[i] - max) * inverse_temperature);
  }
}

EDGELLM_WIDEST uint64_t sum_at_least(int32_t threshold, std::span<const int32_t> weights) {
  uint64_t total = 0;
  for (const int32_t weight : weights) total += static_cast<uint32_t>(weight >= threshold ? weight : 0);
  return total;
}

EDGELLM_WIDEST void keep_up_to(std::span<const float> keys, int32_t last, std::span<int32_t> weights) {
  const float cut = keys[last];
  for (size_t i = 0; i < keys.size(); ++i) {
    const bool kept = keys[i] > cut || (keys[i] == cut && static_cast<int32_t>(i) <= last);
    weights[i] = kept ? weights[i] : 0;
  }
}

EDGELLM_WIDEST void keep_up_to(std::span<const int32_t> keys, int32_t last, std::span<int32_t> weights) {
  const int32_t cut = keys[last];
  for (size_t i = 0; i < keys.size(); ++i) {
    const bool kept = keys[i] > cut || (keys[i] == cut && static_cast<int32_t>(i) <= last);
    weights[i] = kept ? weights[i] : 0;
  }
}

EDGELLM_WIDEST void keep_at_least(double threshold, std::span<int32_t> weights) {
  for (int32_t& weight : weights) weight = weight < threshold ? 0 : weight;
}

}  // namespace edgellm::sampler

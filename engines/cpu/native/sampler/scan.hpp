// Passes over a whole vocabulary. Compiled without contraction into fused multiply-add, so that every machine
// computes the same bits.
#pragma once

#include <cstdint>
#include <span>

namespace edgellm::sampler {

// Weight of the largest logit.
inline constexpr int32_t kWeightOne = 1 << 30;

struct Peak {
  float max;
  bool has_nan;
};

// The largest logit, and whether any is NaN.
Peak find_peak(std::span<const float> logits);

// weights[i] = round(exp((logits[i] - max) * inverse_temperature) * kWeightOne), the exponential as in Cephes' expf.
void compute_weights(std::span<const float> logits, float max, float inverse_temperature, std::span<int32_t> weights);

// Sum of the weights that are at least the threshold, which is positive.
uint64_t sum_at_least(int32_t threshold, std::span<const int32_t> weights);

// Zeroes the weights of all tokens but those that precede or are the token `last`, in the order of descending key,
// then ascending id.
void keep_up_to(std::span<const float> keys, int32_t last, std::span<int32_t> weights);
void keep_up_to(std::span<const int32_t> keys, int32_t last, std::span<int32_t> weights);

// Zeroes the weights that are below the threshold.
void keep_at_least(double threshold, std::span<int32_t> weights);

}  // namespace edgellm::sampler

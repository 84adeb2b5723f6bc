#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "philox.hpp"
#include "scan.hpp"

namespace edgellm::sampler {
namespace {

// The high 64 bits of the product: a number below `bound`, as uniform as the 64 random bits.
uint64_t scale_to(uint64_t random, uint64_t bound) {
  const uint64_t low = (random & 0xFFFFFFFF) * (bound & 0xFFFFFFFF);
  const uint64_t middle0 = (random >> 32) * (bound & 0xFFFFFFFF) + (low >> 32);
  const uint64_t middle1 = (random & 0xFFFFFFFF) * (bound >> 32) + (middle0 & 0xFFFFFFFF);
  return (random >> 32) * (bound >> 32) + (middle0 >> 32) + (middle1 >> 32);
}

int32_t first_of(std::span<const float> logits, float value) {
  return static_cast<int32_t>(std::find(logits.begin(), logits.end(), value) - logits.begin());
}

int32_t token_at(std::span<const int32_t> weights, uint64_t target) {
  uint64_t cumulative = 0;
  size_t token = 0;
  while ((cumulative += static_cast<uint32_t>(weights[token])) <= target) ++token;
  return static_cast<int32_t>(token);
}

Peak finite_peak(std::span<const float> logits) {
  const Peak peak = find_peak(logits);
  if (peak.has_nan || !std::isfinite(peak.max)) {
    throw std::invalid_argument(
        "logits hold NaN or +infinity, or are all "
        "-infinity: the model's output is broken");
  }
  return peak;
}

}  // namespace

Sampler::Sampler(size_t vocab_size) : adjusted_(vocab_size), weights_(vocab_size), is_seen_(vocab_size) {
  scratch_.reserve(vocab_size);
}

Choice Sampler::sample(std::span<const float> logits, const Params& params, std::span<const int32_t> history,
                       const Bias& bias, uint64_t index) {
  if (logits.size() != weights_.size()) {
    throw std::invalid_argument("a row of " + std::to_string(logits.size()) + " logits; this sampler is for " +
                                std::to_string(weights_.size()));
  }
  const float max = finite_peak(logits).max;
  compute_weights(logits, max, 1.0F, weights_);
  const double log_total = std::log(static_cast<double>(sum_at_least(1, weights_)) / kWeightOne);
  const auto adjusted = adjust(logits, params, history, bias);
  const float adjusted_max = adjusted.data() == logits.data() ? max : finite_peak(adjusted).max;
  const int32_t token =
      params.temperature == 0 ? first_of(adjusted, adjusted_max) : draw(adjusted, adjusted_max, params, index);
  return {token, static_cast<float>(static_cast<double>(logits[token] - max) - log_total)};
}

std::span<const float> Sampler::adjust(std::span<const float> logits, const Params& params,
                                       std::span<const int32_t> history, const Bias& bias) {
  if (params.repetition_penalty == 1.0F && bias.tokens.empty()) return logits;
  std::copy(logits.begin(), logits.end(), adjusted_.begin());
  if (params.repetition_penalty != 1.0F) penalise(params.repetition_penalty, history);
  for (size_t i = 0; i < bias.tokens.size(); ++i) {
    check_token(bias.tokens[i]);
    adjusted_[bias.tokens[i]] += bias.values[i];
  }
  return adjusted_;
}

void Sampler::penalise(float penalty, std::span<const int32_t> history) {
  for (const int32_t token : history) check_token(token);
  for (const int32_t token : history) {
    if (is_seen_[token] != 0) continue;
    is_seen_[token] = 1;
    adjusted_[token] = adjusted_[token] > 0 ? adjusted_[token] / penalty : adjusted_[token] * penalty;
  }
  for (const int32_t token : history) is_seen_[token] = 0;
}

void Sampler::check_token(int32_t token) const {
  if (token < 0 || static_cast<size_t>(token) >= weights_.size()) {
    throw std::invalid_argument("token id " + std::to_string(token) + " is outside of the vocabulary of " +
                                std::to_string(weights_.size()));
  }
}

int32_t Sampler::draw(std::span<const float> logits, float max, const Params& params, uint64_t index) {
  const auto inverse_temperature = static_cast<float>(1.0 / params.temperature);
  compute_weights(logits, max, inverse_temperature, weights_);
  const auto top_k = static_cast<size_t>(params.top_k);
  if (top_k > 0 && top_k < logits.size()) keep_top_k(logits, top_k);
  if (params.top_p < 1.0) keep_top_p(params.top_p);
  if (params.min_p > 0.0) keep_at_least(params.min_p * kWeightOne, weights_);
  return token_at(weights_, scale_to(random_u64(params.seed, index), sum_at_least(1, weights_)));
}

// A heap of the best k so far, the worst of them on top. Tokens come in ascending order, so one that only equals the
// worst is never better.
void Sampler::keep_top_k(std::span<const float> logits, size_t top_k) {
  const auto is_better = [&](int32_t a, int32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  scratch_.clear();
  for (size_t i = 0; i < top_k; ++i) scratch_.push_back(static_cast<int32_t>(i));
  std::make_heap(scratch_.begin(), scratch_.end(), is_better);
  float worst = logits[scratch_.front()];
  for (size_t i = top_k; i < logits.size(); ++i) {
    if (logits[i] <= worst) continue;
    std::pop_heap(scratch_.begin(), scratch_.end(), is_better);
    scratch_.back() = static_cast<int32_t>(i);
    std::push_heap(scratch_.begin(), scratch_.end(), is_better);
    worst = logits[scratch_.front()];
  }
  keep_up_to(logits, scratch_.front(), weights_);
}

// The weight at which the likeliest tokens reach the target is found bit by bit; of the tokens with exactly that
// weight, the first ones are kept. All weights below the mean of what may be left out cannot together be more than
// that, so they are not looked at.
void Sampler::keep_top_p(double top_p) {
  const auto total = static_cast<double>(sum_at_least(1, weights_));
  const double target = top_p * total;
  const auto mean_left_out = static_cast<int32_t>((total - target) / static_cast<double>(weights_.size()));
  collect(std::max(mean_left_out, 1));
  int32_t cut = 0;
  for (int32_t bit = kWeightOne; bit > 0; bit >>= 1) {
    if (static_cast<double>(sum_at_least(cut | bit, scratch_)) >= target) cut |= bit;
  }
  auto cumulative = static_cast<double>(sum_at_least(cut + 1, scratch_));
  size_t last = 0;
  while (weights_[last] != cut || (cumulative += cut) < target) ++last;
  keep_up_to(weights_, static_cast<int32_t>(last), weights_);
}

void Sampler::collect(int32_t threshold) {
  scratch_.clear();
  for (const int32_t weight : weights_) {
    if (weight >= threshold) scratch_.push_back(weight);
  }
}

}  // namespace edgellm::sampler

// Chooses one token from one row of logits. engines/sampling_reference.py defines what is computed.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace edgellm::sampler {

struct Params {
  double temperature;  // 0: greedy
  int64_t top_k;       // 0: all
  double top_p;
  double min_p;
  float repetition_penalty;
  uint64_t seed;
};

struct Bias {
  std::span<const int32_t> tokens;
  std::span<const float> values;  // [tokens]
};

struct Choice {
  int32_t token;
  float logprob;
};

// Holds the buffers of one vocabulary, so that a call allocates nothing. Not thread-safe.
class Sampler {
 public:
  explicit Sampler(size_t vocab_size);

  // logits [vocab_size]; history: tokens so far; index: of the token within its answer.
  // Throws std::invalid_argument for NaN or infinite logits, and for token ids outside of the vocabulary.
  Choice sample(std::span<const float> logits, const Params& params, std::span<const int32_t> history, const Bias& bias,
                uint64_t index);

 private:
  std::span<const float> adjust(std::span<const float> logits, const Params& params, std::span<const int32_t> history,
                                const Bias& bias);
  void penalise(float penalty, std::span<const int32_t> history);
  void check_token(int32_t token) const;
  int32_t draw(std::span<const float> logits, float max, const Params& params, uint64_t index);
  void keep_top_k(std::span<const float> logits, size_t top_k);
  void keep_top_p(double top_p);
  // Fills scratch_ with the weights that are at least the threshold.
  void collect(int32_t threshold);

  std::vector<float> adjusted_;   // [vocab_size]
  std::vector<int32_t> weights_;  // [vocab_size]
  std::vector<int32_t> scratch_;  // the heap of top-k, then the weights that top-p looks at; at most vocab_size
  std::vector<uint8_t> is_seen_;  // [vocab_size], all zero between calls
};

}  // namespace edgellm::sampler

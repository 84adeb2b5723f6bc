// Attention as it is written down: all scores, their softmax, the weighted sum of values, in float64.
#include <cmath>
#include <vector>

#include "../half.hpp"
#include "attend.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

struct Position {
  const KvLayer& kv;
  const std::uint8_t* block;
  std::int64_t token, head;

  // Index of the K (0) or V (1) vector among the vectors of the block.
  std::int64_t index(int half) const { return (half * kBlockTokens + token) * kv.kv_heads + head; }
};

struct Fp16Cache {
  static double value(const Position& at, int half, std::int64_t d) {
    return fp16_to_float(reinterpret_cast<const std::uint16_t*>(at.block)[at.index(half) * at.kv.head_dim + d]);
  }
};

struct Int8Cache {
  static double value(const Position& at, int half, std::int64_t d) {
    const std::int64_t values = 2 * kBlockTokens * at.kv.kv_heads * at.kv.head_dim;
    const float scale = fp16_to_float(reinterpret_cast<const std::uint16_t*>(at.block + values)[at.index(half)]);
    return 1.0 * reinterpret_cast<const std::int8_t*>(at.block)[at.index(half) * at.kv.head_dim + d] * scale;
  }
};

Position position_of(const AttendArgs& args, const AttendTask& task, std::int64_t head, std::int64_t position) {
  const std::uint8_t* block = args.kv.data + task.blocks[position / kBlockTokens] * args.kv.block_bytes;
  return {args.kv, block, position % kBlockTokens, head};
}

std::vector<double> softmax(std::vector<double> scores) {
  double largest = scores[0];
  for (const double score : scores) largest = std::fmax(largest, score);
  double total = 0.0;
  for (double& score : scores) total += score = std::exp(score - largest);
  for (double& score : scores) score /= total;
  return scores;
}

template <class Cache>
void attend_head(const AttendArgs& args, const AttendTask& task, std::int64_t row, std::int64_t head) {
  const std::int64_t dim = args.kv.head_dim;
  const std::int64_t kv_head = head / (args.num_heads / args.kv.kv_heads);
  const float* q = args.q.data + (task.first_row + row) * args.q.stride + head * dim;
  float* out = args.out.data + (task.first_row + row) * args.out.stride + head * dim;
  std::vector<double> scores(task.first_position + row + 1);
  for (std::size_t t = 0; t < scores.size(); ++t) {
    const Position key = position_of(args, task, kv_head, t);
    for (std::int64_t d = 0; d < dim; ++d) scores[t] += args.scale * q[d] * Cache::value(key, 0, d);
  }
  const std::vector<double> weights = softmax(scores);
  for (std::int64_t d = 0; d < dim; ++d) {
    double total = 0.0;
    for (std::size_t t = 0; t < weights.size(); ++t) {
      total += weights[t] * Cache::value(position_of(args, task, kv_head, t), 1, d);
    }
    out[d] = static_cast<float>(total);
  }
}

template <class Cache>
void attend(const AttendArgs& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t group = args.num_heads / args.kv.kv_heads;
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const AttendTask& task = args.tasks[unit / args.kv.kv_heads];
    for (std::int64_t vector = 0; vector < task.rows * group; ++vector) {
      attend_head<Cache>(args, task, vector / group, unit % args.kv.kv_heads * group + vector % group);
    }
  }
}

}  // namespace

void attend_fp16(const AttendArgs& args, std::int64_t begin, std::int64_t end, float*) {
  attend<Fp16Cache>(args, begin, end);
}

void attend_int8(const AttendArgs& args, std::int64_t begin, std::int64_t end, float*) {
  attend<Int8Cache>(args, begin, end);
}

}  // namespace edgellm::EDGELLM_ISA

// Attention as it is written down: all scores, their softmax, the weighted sum of values, in float64.
#include <algorithm>
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

// One query head of one row.
struct Query {
  const AttendArgs& args;
  const AttendTask& task;
  std::int64_t row, head;

  std::int64_t kv_head() const { return head / (args.num_heads / args.kv.kv_heads); }
  std::int64_t tokens() const { return task.first_position + row + 1; }
  const float* q() const { return args.q.data + (task.first_row + row) * args.q.stride + head * args.kv.head_dim; }
  float* out() const { return args.out.data + (task.first_row + row) * args.out.stride + head * args.kv.head_dim; }
  Position at(std::int64_t token) const {
    const std::uint8_t* block = args.kv.data + task.blocks[token / kBlockTokens] * args.kv.block_bytes;
    return {args.kv, block, token % kBlockTokens, kv_head()};
  }
};

// Attention over some tokens: sum of exp(score - largest) * value, not divided by the total.
struct Result {
  std::vector<double> sums;
  double largest, total;
};

template <class Cache>
Result attend_tokens(const Query& query, std::int64_t first, std::int64_t end) {
  const std::int64_t dim = query.args.kv.head_dim;
  std::vector<double> scores;
  for (std::int64_t t = first; t < end; ++t) {
    double score = 0.0;
    for (std::int64_t d = 0; d < dim; ++d) score += query.args.scale * query.q()[d] * Cache::value(query.at(t), 0, d);
    scores.push_back(score);
  }
  Result result{std::vector<double>(dim), scores[0], 0.0};
  for (const double score : scores) result.largest = std::fmax(result.largest, score);
  for (std::int64_t t = first; t < end; ++t) {
    const double weight = std::exp(scores[t - first] - result.largest);
    result.total += weight;
    for (std::int64_t d = 0; d < dim; ++d) result.sums[d] += weight * Cache::value(query.at(t), 1, d);
  }
  return result;
}

void write_out(const Query& query, const Result& result) {
  for (std::int64_t d = 0; d < query.args.kv.head_dim; ++d) {
    query.out()[d] = static_cast<float>(result.sums[d] / result.total);
  }
}

float* result_of(const AttendPiece& piece, const Query& query, std::int64_t vector) {
  const std::int64_t vectors = piece.task.rows * (query.args.num_heads / query.args.kv.kv_heads);
  return piece.results + (query.kv_head() * vectors + vector) * result_floats(query.args.kv.head_dim);
}

template <class Cache>
void attend_segment(const AttendPiece& piece, const Query& query, std::int64_t vector) {
  const std::int64_t first = piece.segment * kSegmentTokens;
  const std::int64_t end = std::min(query.tokens(), first + kSegmentTokens);
  if (first >= end) return;
  const Result result = attend_tokens<Cache>(query, first, end);
  float* out = result_of(piece, query, vector);
  std::copy(result.sums.begin(), result.sums.end(), out);
  out[padded_head(query.args.kv.head_dim)] = static_cast<float>(result.largest);
  out[padded_head(query.args.kv.head_dim) + 1] = static_cast<float>(result.total);
}

// body(query, vector) for each vector of unit piece * kv_heads + kv_head.
template <class Body>
void each_vector(const AttendArgs& args, const AttendPiece& piece, std::int64_t kv_head, const Body& body) {
  const std::int64_t group = args.num_heads / args.kv.kv_heads;
  for (std::int64_t v = 0; v < piece.task.rows * group; ++v) {
    body(Query{args, piece.task, v / group, kv_head * group + v % group}, v);
  }
}

template <class Cache>
void attend(const AttendArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const AttendPiece& piece = args.pieces[unit / args.kv.kv_heads];
    each_vector(args, piece, unit % args.kv.kv_heads, [&](const Query& query, std::int64_t vector) {
      if (piece.segment == kAllSegments) {
        write_out(query, attend_tokens<Cache>(query, 0, query.tokens()));
      } else {
        attend_segment<Cache>(piece, query, vector);
      }
    });
  }
}

// Segments of one vector, scaled to the largest score of them all.
Result merge(const AttendPiece* pieces, const Query& query, std::int64_t vector) {
  const std::int64_t dim = query.args.kv.head_dim;
  const std::int64_t segments = (query.tokens() + kSegmentTokens - 1) / kSegmentTokens;
  const auto part = [&](std::int64_t s) { return result_of(pieces[s], query, vector); };
  Result result{std::vector<double>(dim), part(0)[padded_head(dim)], 0.0};
  for (std::int64_t s = 1; s < segments; ++s) result.largest = std::fmax(result.largest, part(s)[padded_head(dim)]);
  for (std::int64_t s = 0; s < segments; ++s) {
    const double weight = std::exp(part(s)[padded_head(dim)] - result.largest);
    result.total += weight * part(s)[padded_head(dim) + 1];
    for (std::int64_t d = 0; d < dim; ++d) result.sums[d] += weight * part(s)[d];
  }
  return result;
}

}  // namespace

void attend_fp16(const AttendArgs& args, std::int64_t begin, std::int64_t end, float*) {
  attend<Fp16Cache>(args, begin, end);
}

void attend_int8(const AttendArgs& args, std::int64_t begin, std::int64_t end, float*) {
  attend<Int8Cache>(args, begin, end);
}

void merge_segments(const AttendArgs& args, std::int64_t begin, std::int64_t end, float*) {
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const AttendPiece* pieces = args.pieces + args.split[unit / args.kv.kv_heads];
    each_vector(args, *pieces, unit % args.kv.kv_heads,
                [&](const Query& query, std::int64_t vector) { write_out(query, merge(pieces, query, vector)); });
  }
}

}  // namespace edgellm::EDGELLM_ISA

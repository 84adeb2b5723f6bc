#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// Unit: panel. out[m, n] = x[m] . w[n] (+ outliers) (+ bias[n]) (+ residual[m, n]).
struct LinearArgs {
  Records x;
  std::int64_t rows;
  const std::uint8_t* weight;          // packed panels
  const std::uint16_t* group_scale;    // fp16 [panels][groups][16], for int4
  const float* column_scale;           // [panels * 16]: int8's scale; for int4 a power of two that undoes fp16's range
  const std::uint8_t* outlier_weight;  // packed [panels][padded_outliers/2][16][2] bf16
  const float* bias;                   // [panels * 16] or null
  std::int64_t channels;               // padded
  std::int64_t group_size, outliers;   // outliers padded
  std::int64_t columns;
  const float* residual;  // [rows, columns] or null
  std::int64_t residual_stride;
  Rows out;
};

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

void linear_half(const LinearArgs& args, std::int64_t begin, std::int64_t end);
void linear_int8(const LinearArgs& args, std::int64_t begin, std::int64_t end);
void linear_int8x16(const LinearArgs& args, std::int64_t begin, std::int64_t end);
void linear_int4(const LinearArgs& args, std::int64_t begin, std::int64_t end);
void linear_int4_float(const LinearArgs& args, std::int64_t begin, std::int64_t end);
// On AMX only:
void linear_int8_tiles(const LinearArgs& args, std::int64_t begin, std::int64_t end);
void linear_int8x16_tiles(const LinearArgs& args, std::int64_t begin, std::int64_t end);
void linear_int4_tiles(const LinearArgs& args, std::int64_t begin, std::int64_t end);

}  // namespace edgellm::EDGELLM_ISA
#endif

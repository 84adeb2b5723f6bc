#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// Unit: row. What a linear multiplies with: x * input_scale, rounded to its form; outlier columns of unscaled x beside.
struct PrepareArgs {
  Rows x;
  Records out;
  const float* input_scale;             // [channels], zero at outlier columns; null: all ones
  const std::int32_t* outlier_columns;  // [outliers]
  std::int64_t channels, padded_channels, outliers, padded_outliers;
  std::int64_t group_size;  // channels per sum, for int8
  float quant_max;          // 127 or 7 for int8, kInt16Max for int16
  std::int64_t rows = 0;    // of the step, which tiles are cut from
};

}  // namespace edgellm

#if defined(EDGELLM_ISA)
namespace edgellm::EDGELLM_ISA {

void prepare_half(const PrepareArgs& args, std::int64_t begin, std::int64_t end);
// On AMX only: into tiles, see amx_half.hpp.
void prepare_half_tiles(const PrepareArgs& args, std::int64_t begin, std::int64_t end);
void prepare_float(const PrepareArgs& args, std::int64_t begin, std::int64_t end);
void prepare_int8(const PrepareArgs& args, std::int64_t begin, std::int64_t end);
void prepare_int16(const PrepareArgs& args, std::int64_t begin, std::int64_t end);

}  // namespace edgellm::EDGELLM_ISA
#endif

#pragma once

#include <cstdint>

#include "rows.hpp"

namespace edgellm {

// Where panels begin in the memory of a linear's weights.
struct PanelMemory {
  const std::uint8_t* weight;
  const std::uint8_t* outlier_weight;
  const std::uint16_t* group_scale;
};

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
  std::int64_t panel_bytes;  // of `weight`
  PanelMemory ahead;         // of the same file: what the thread reads after these panels, asked for where rows are few
};

constexpr std::int64_t panel_bytes(std::int64_t channels, int weight_bits) {
  return channels * kPanelColumns * weight_bits / 8;
}

// Where there are no outliers or no group scales, the weights take their place: there is nothing else to ask for.
inline PanelMemory panel_memory(const LinearArgs& args, std::int64_t panel) {
  PanelMemory memory{args.weight + panel * args.panel_bytes, args.weight,
                     reinterpret_cast<const std::uint16_t*>(args.weight)};
  if (args.outliers > 0) memory.outlier_weight = args.outlier_weight + panel * panel_bytes(args.outliers, 16);
  if (args.group_scale != nullptr) {
    memory.group_scale = args.group_scale + panel * (args.channels / args.group_size) * kPanelColumns;
  }
  return memory;
}

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

#include <cmath>
#include <cstring>

#include "prepare.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

float channel(const PrepareArgs& args, std::int64_t row, std::int64_t k) {
  const float x = k < args.channels ? args.x.data[row * args.x.stride + k] : 0.0F;
  return args.input_scale != nullptr && k < args.channels ? x * args.input_scale[k] : x;
}

// Channels in float32: here HalfIn is float.
void copy_channels(const PrepareArgs& args, std::int64_t row, float* out) {
  for (std::int64_t k = 0; k < args.padded_channels; ++k) out[k] = channel(args, row, k);
}

void copy_outliers(const PrepareArgs& args, std::int64_t row, float* out) {
  for (std::int64_t o = 0; o < args.padded_outliers; ++o) {
    out[o] = o < args.outliers ? args.x.data[row * args.x.stride + args.outlier_columns[o]] : 0.0F;
  }
}

float largest_magnitude(const PrepareArgs& args, std::int64_t row) {
  float largest = 0.0F;
  for (std::int64_t k = 0; k < args.channels; ++k) largest = std::fmax(largest, std::fabs(channel(args, row, k)));
  return largest;
}

float quantize(const PrepareArgs& args, std::int64_t row, std::int8_t* q, std::int32_t* sums) {
  const float largest = largest_magnitude(args, row);
  const float inverse = largest > 0.0F ? args.quant_max / largest : 0.0F;
  for (std::int64_t k = 0; k < args.padded_channels; ++k) {
    if (k % args.group_size == 0) sums[k / args.group_size] = 0;
    q[k] = static_cast<std::int8_t>(std::nearbyint(channel(args, row, k) * inverse));
    sums[k / args.group_size] += q[k];
  }
  return largest / args.quant_max;
}

// High parts, low parts; the sums of both.
float quantize_in_two(const PrepareArgs& args, std::int64_t row, std::int8_t* q, std::int32_t* sums) {
  const float largest = largest_magnitude(args, row);
  const float inverse = largest > 0.0F ? args.quant_max / largest : 0.0F;
  sums[0] = sums[1] = 0;
  for (std::int64_t k = 0; k < args.padded_channels; ++k) {
    const auto whole = static_cast<std::int32_t>(std::nearbyint(channel(args, row, k) * inverse));
    const auto high = static_cast<std::int32_t>(std::floor((whole + kInt16Base / 2) / static_cast<double>(kInt16Base)));
    q[k] = static_cast<std::int8_t>(high);
    q[args.padded_channels + k] = static_cast<std::int8_t>(whole - kInt16Base * high);
    sums[0] += q[k];
    sums[1] += q[args.padded_channels + k];
  }
  return largest / args.quant_max;
}

}  // namespace

void prepare_half(const PrepareArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    copy_channels(args, row, reinterpret_cast<float*>(args.out.data + row * args.out.row_bytes));
  }
}

void prepare_float(const PrepareArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    std::uint8_t* record = args.out.data + row * args.out.row_bytes;
    copy_channels(args, row, reinterpret_cast<float*>(record));
    copy_outliers(args, row, reinterpret_cast<float*>(record + args.out.outliers_at));
  }
}

void prepare_int8(const PrepareArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    std::uint8_t* record = args.out.data + row * args.out.row_bytes;
    const float scale = quantize(args, row, reinterpret_cast<std::int8_t*>(record),
                                 reinterpret_cast<std::int32_t*>(record + args.out.sums_at));
    std::memcpy(record + args.out.scale_at, &scale, sizeof(scale));
    copy_outliers(args, row, reinterpret_cast<float*>(record + args.out.outliers_at));
  }
}

void prepare_int16(const PrepareArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    std::uint8_t* record = args.out.data + row * args.out.row_bytes;
    const float scale = quantize_in_two(args, row, reinterpret_cast<std::int8_t*>(record),
                                        reinterpret_cast<std::int32_t*>(record + args.out.sums_at));
    std::memcpy(record + args.out.scale_at, &scale, sizeof(scale));
  }
}

}  // namespace edgellm::EDGELLM_ISA

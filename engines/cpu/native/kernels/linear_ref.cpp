// All forms of linear: unpack one weight at a time, add up in float64.
#include <cstring>

#include "../half.hpp"
#include "linear.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

// Index of (column n, channel k) in [N/16][channels/Channels][16][Channels].
template <int Channels>
std::int64_t packed_index(std::int64_t channels, std::int64_t n, std::int64_t k) {
  const std::int64_t line = n / kPanelColumns * (channels / Channels) + k / Channels;
  return (line * kPanelColumns + n % kPanelColumns) * Channels + k % Channels;
}

float half_weight(const std::uint8_t* packed, std::int64_t channels, std::int64_t n, std::int64_t k) {
  std::uint16_t bits;
  std::memcpy(&bits, packed + 2 * packed_index<2>(channels, n, k), sizeof(bits));
  return bf16_to_float(bits);
}

int int8_weight(const LinearArgs& args, std::int64_t n, std::int64_t k) {
  return args.weight[packed_index<4>(args.channels, n, k)] - 128;
}

int int4_weight(const LinearArgs& args, std::int64_t n, std::int64_t k) {
  const std::int64_t line = n / kPanelColumns * (args.channels / 8) + k / 8;
  const std::uint8_t both = args.weight[(line * kPanelColumns + n % kPanelColumns) * 4 + k % 4];
  return (k % 8 < 4 ? both & 15 : both >> 4) - 8;
}

double group_scale(const LinearArgs& args, std::int64_t n, std::int64_t k) {
  const std::int64_t groups = args.channels / args.group_size;
  const std::int64_t index = (n / kPanelColumns * groups + k / args.group_size) * kPanelColumns + n % kPanelColumns;
  return fp16_to_float(args.group_scale[index]);
}

template <class T>
const T* record(const LinearArgs& args, std::int64_t row, std::int64_t offset) {
  return reinterpret_cast<const T*>(args.x.data + row * args.x.row_bytes + offset);
}

double outlier_sum(const LinearArgs& args, std::int64_t row, std::int64_t n) {
  double total = 0.0;
  for (std::int64_t o = 0; o < args.outliers; ++o) {
    const double x = record<float>(args, row, args.x.outliers_at)[o];
    total += x * half_weight(args.outlier_weight, args.outliers, n, o);
  }
  return total;
}

// value(row, n) is the product before bias and residual.
template <class Value>
void linear(const LinearArgs& args, std::int64_t begin, std::int64_t end, Value value) {
  for (std::int64_t row = 0; row < args.rows; ++row) {
    for (std::int64_t n = begin * kPanelColumns; n < end * kPanelColumns && n < args.columns; ++n) {
      double y = value(row, n);
      if (args.bias != nullptr) y += args.bias[n];
      if (args.residual != nullptr) y += args.residual[row * args.residual_stride + n];
      args.out.data[row * args.out.stride + n] = static_cast<float>(y);
    }
  }
}

template <class Term>
double sum(std::int64_t channels, Term term) {
  double total = 0.0;
  for (std::int64_t k = 0; k < channels; ++k) total += term(k);
  return total;
}

}  // namespace

void linear_half(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  linear(args, begin, end, [&](std::int64_t row, std::int64_t n) {
    const auto* x = record<float>(args, row, 0);
    return sum(args.channels,
               [&](std::int64_t k) { return 1.0 * x[k] * half_weight(args.weight, args.channels, n, k); });
  });
}

void linear_int8(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  linear(args, begin, end, [&](std::int64_t row, std::int64_t n) {
    const auto* x = record<std::int8_t>(args, row, 0);
    const double scale = 1.0 * *record<float>(args, row, args.x.scale_at) * args.column_scale[n];
    return scale * sum(args.channels, [&](std::int64_t k) { return 1.0 * x[k] * int8_weight(args, n, k); });
  });
}

void linear_int8x16(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  linear(args, begin, end, [&](std::int64_t row, std::int64_t n) {
    const auto* high = record<std::int8_t>(args, row, 0);
    const std::int8_t* low = high + args.channels;
    const double scale = 1.0 * *record<float>(args, row, args.x.scale_at) * args.column_scale[n];
    const auto x = [&](std::int64_t k) { return 1.0 * kInt16Base * high[k] + low[k]; };
    return scale * sum(args.channels, [&](std::int64_t k) { return x(k) * int8_weight(args, n, k); });
  });
}

void linear_int4(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  linear(args, begin, end, [&](std::int64_t row, std::int64_t n) {
    const auto* x = record<std::int8_t>(args, row, 0);
    const double scale = 1.0 * *record<float>(args, row, args.x.scale_at) * args.column_scale[n];
    const auto term = [&](std::int64_t k) { return group_scale(args, n, k) * x[k] * int4_weight(args, n, k); };
    return scale * sum(args.channels, term) + outlier_sum(args, row, n);
  });
}

void linear_int4_float(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  linear(args, begin, end, [&](std::int64_t row, std::int64_t n) {
    const auto* x = record<float>(args, row, 0);
    const auto term = [&](std::int64_t k) { return group_scale(args, n, k) * x[k] * int4_weight(args, n, k); };
    return args.column_scale[n] * sum(args.channels, term) + outlier_sum(args, row, n);
  });
}

}  // namespace edgellm::EDGELLM_ISA

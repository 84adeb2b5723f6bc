#include "prepare.hpp"

#include "../simd/simd.hpp"

namespace edgellm::EDGELLM_ISA {

namespace {

F32 scaled(const PrepareArgs& args, const float* x, std::int64_t k) {
  const int n = static_cast<int>(args.channels - k);
  const F32 value = load_n(x + k, n);
  return args.input_scale != nullptr ? mul(value, load_n(args.input_scale + k, n)) : value;
}

void gather_outliers(const PrepareArgs& args, const float* x, std::uint8_t* record) {
  auto* out = reinterpret_cast<HalfIn*>(record + args.out.outliers_at);
  for (std::int64_t i = 0; i < args.padded_outliers; i += kLanes) {
    float lanes[kLanes] = {};
    for (std::int64_t j = i; j < i + kLanes && j < args.outliers; ++j) {
      lanes[j - i] = x[args.outlier_columns[j]];
    }
    store_half_n(out + i, load(lanes), static_cast<int>(args.padded_outliers - i));
  }
}

float largest_magnitude(const PrepareArgs& args, const float* x) {
  F32 largest = zero();
  for (std::int64_t k = 0; k < args.channels; k += kLanes) {
    largest = max(largest, abs(scaled(args, x, k)));
  }
  return reduce_max(largest);
}

// Symmetric, to nearest even; the scale maps the largest magnitude to quant_max. store(k, q) takes 16 channels from k.
template <class Store>
void quantize(const PrepareArgs& args, const float* x, std::uint8_t* record, const Store& store) {
  const float largest = largest_magnitude(args, x);
  const float scale = largest / args.quant_max;
  std::memcpy(record + args.out.scale_at, &scale, sizeof(scale));
  const F32 inverse = set1(largest > 0.0F ? args.quant_max / largest : 0.0F);
  const F32 limit = set1(args.quant_max);
  for (std::int64_t k = 0; k < args.padded_channels; k += kLanes) {
    store(k, to_i32(min(max(mul(scaled(args, x, k), inverse), sub(zero(), limit)), limit)));
  }
}

void sum_groups(const PrepareArgs& args, std::int64_t groups, std::uint8_t* record) {
  const auto* q = reinterpret_cast<const std::int8_t*>(record);
  for (std::int64_t group = 0; group < groups; ++group) {
    std::int32_t total = 0;
    for (std::int64_t k = group * args.group_size; k < (group + 1) * args.group_size; ++k) {
      total += q[k];
    }
    std::memcpy(record + args.out.sums_at + group * 4, &total, sizeof(total));
  }
}

}  // namespace

void prepare_half(const PrepareArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = args.x.data + row * args.x.stride;
    auto* out = reinterpret_cast<HalfIn*>(args.out.data + row * args.out.row_bytes);
    for (std::int64_t k = 0; k < args.padded_channels; k += kLanes) {
      store_half_n(out + k, scaled(args, x, k), static_cast<int>(args.padded_channels - k));
    }
  }
}

void prepare_float(const PrepareArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = args.x.data + row * args.x.stride;
    std::uint8_t* record = args.out.data + row * args.out.row_bytes;
    for (std::int64_t k = 0; k < args.padded_channels; k += kLanes) {
      store_n(reinterpret_cast<float*>(record) + k, scaled(args, x, k), static_cast<int>(args.padded_channels - k));
    }
    gather_outliers(args, x, record);
  }
}

void prepare_int8(const PrepareArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* x = args.x.data + row * args.x.stride;
    std::uint8_t* record = args.out.data + row * args.out.row_bytes;
    auto* out = reinterpret_cast<std::int8_t*>(record);
    quantize(args, x, record,
             [&](std::int64_t k, I32 q) { store_i8_n(out + k, q, static_cast<int>(args.padded_channels - k)); });
    sum_groups(args, args.padded_channels / args.group_size, record);
    gather_outliers(args, x, record);
  }
}

void prepare_int16(const PrepareArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    std::uint8_t* record = args.out.data + row * args.out.row_bytes;
    auto* high = reinterpret_cast<std::int8_t*>(record);
    std::int8_t* low = high + args.padded_channels;
    quantize(args, args.x.data + row * args.x.stride, record, [&](std::int64_t k, I32 q) {
      const int n = static_cast<int>(args.padded_channels - k);
      const I32 upper = shift_right_signed<7>(add(q, set1_i32(kInt16Base / 2)));
      store_i8_n(high + k, upper, n);
      store_i8_n(low + k, sub(q, shift_left<7>(upper)), n);
    });
    sum_groups(args, 2, record);
  }
}

}  // namespace edgellm::EDGELLM_ISA

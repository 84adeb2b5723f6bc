// simd.hpp on Armv8.2 with dot products and half-precision conversion (Cortex-A78AE): four registers per value.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace edgellm::EDGELLM_ISA {

inline constexpr int kInt4Offset = 0;
inline constexpr int kInt8Offset = 0;
inline constexpr int kTileRows = 4;
inline constexpr int kTilePanels = 1;
inline constexpr int kSingleRowPanels = 4;
inline constexpr int kAskedBytes = 128 << 10;  // ahead of a tile, at most: so much stays in the second cache

struct F32 {
  float32x4_t v[4];
};
struct I32 {
  int32x4_t v[4];
};

template <class Result, class Part>
inline Result each_quad(Part part) {
  return {part(0), part(1), part(2), part(3)};
}
template <class T>
inline void copy_first(T* p, const void* lanes, int n) {
  std::memcpy(p, lanes, (n >= 16 ? 16U : static_cast<unsigned>(n < 0 ? 0 : n)) * sizeof(T));
}

inline F32 set1(float x) {
  return each_quad<F32>([=](int) { return vdupq_n_f32(x); });
}
inline F32 zero() { return set1(0.0F); }
inline F32 load(const float* p) {
  return each_quad<F32>([=](int i) { return vld1q_f32(p + 4 * i); });
}
inline F32 load_n(const float* p, int n) {
  float lanes[16] = {};
  copy_first(lanes, p, n);
  return load(lanes);
}
inline void store(float* p, F32 a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline void store_n(float* p, F32 a, int n) {
  float lanes[16];
  store(lanes, a);
  copy_first(p, lanes, n);
}
inline F32 add(F32 a, F32 b) {
  return each_quad<F32>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F32 sub(F32 a, F32 b) {
  return each_quad<F32>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F32 mul(F32 a, F32 b) {
  return each_quad<F32>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F32 div(F32 a, F32 b) {
  return each_quad<F32>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F32 min(F32 a, F32 b) {
  return each_quad<F32>([&](int i) { return vminq_f32(a.v[i], b.v[i]); });
}
inline F32 max(F32 a, F32 b) {
  return each_quad<F32>([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); });
}
inline F32 abs(F32 a) {
  return each_quad<F32>([&](int i) { return vabsq_f32(a.v[i]); });
}
inline F32 fma(F32 a, F32 b, F32 c) {
  return each_quad<F32>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline F32 round_even(F32 a) {
  return each_quad<F32>([&](int i) { return vrndnq_f32(a.v[i]); });
}
inline F32 first_lanes(F32 a, F32 b, int n) {
  static const std::int32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return each_quad<F32>(
      [&](int i) { return vbslq_f32(vcltq_s32(vld1q_s32(lane + 4 * i), vdupq_n_s32(n)), a.v[i], b.v[i]); });
}
inline float reduce_add(F32 a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]))); }
inline float reduce_max(F32 a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[2]), vmaxq_f32(a.v[1], a.v[3]))); }

inline I32 set1_i32(std::int32_t x) {
  return each_quad<I32>([=](int) { return vdupq_n_s32(x); });
}
inline I32 load_i32(const void* p) {
  const auto* bytes = static_cast<const std::uint8_t*>(p);
  return each_quad<I32>([=](int i) { return vreinterpretq_s32_u8(vld1q_u8(bytes + 16 * i)); });
}
inline I32 add(I32 a, I32 b) {
  return each_quad<I32>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline I32 sub(I32 a, I32 b) {
  return each_quad<I32>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
}
inline I32 bit_and(I32 a, I32 b) {
  return each_quad<I32>([&](int i) { return vandq_s32(a.v[i], b.v[i]); });
}
template <int N>
inline I32 shift_left(I32 a) {
  return each_quad<I32>([&](int i) { return vshlq_s32(a.v[i], vdupq_n_s32(N)); });
}
template <int N>
inline I32 shift_right(I32 a) {
  return each_quad<I32>(
      [&](int i) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v[i]), vdupq_n_s32(-N))); });
}
template <int N>
inline I32 shift_right_signed(I32 a) {
  return each_quad<I32>([&](int i) { return vshlq_s32(a.v[i], vdupq_n_s32(-N)); });
}
inline F32 to_f32(I32 a) {
  return each_quad<F32>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
inline I32 to_i32(F32 a) {
  return each_quad<I32>([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
}
inline F32 as_f32(I32 a) {
  return each_quad<F32>([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
}
inline void store_i8_n(std::int8_t* p, I32 a, int n) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  std::int8_t lanes[16];
  vst1q_s8(lanes, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  copy_first(p, lanes, n);
}

inline F32 load_f16(const std::uint16_t* p) {
  return each_quad<F32>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline F32 load_f16_n(const std::uint16_t* p, int n) {
  std::uint16_t lanes[16] = {};
  copy_first(lanes, p, n);
  return load_f16(lanes);
}
inline void store_f16_n(std::uint16_t* p, F32 a, int n) {
  std::uint16_t lanes[16];
  for (int i = 0; i < 4; ++i) vst1_u16(lanes + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
  copy_first(p, lanes, n);
}
inline F32 load_i8_n(const std::int8_t* p, int n) {
  std::int8_t lanes[16] = {};
  copy_first(lanes, p, n);
  const int8x16_t bytes = vld1q_s8(lanes);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes));
  const int16x8_t high = vmovl_s8(vget_high_s8(bytes));
  return to_f32({vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                 vmovl_s16(vget_high_s16(high))});
}

// The first `n` 32-bit words at p, then zeros; no other memory is touched.
inline I32 load_words_n(const void* p, int n) {
  std::int32_t lanes[16] = {};
  copy_first(lanes, p, n);
  return load_i32(lanes);
}

// Lane j of row i becomes lane i of row j, for four rows of four.
inline void transpose_four(int32x4_t (&rows)[4]) {
  const int64x2_t low01 = vreinterpretq_s64_s32(vzip1q_s32(rows[0], rows[1]));
  const int64x2_t high01 = vreinterpretq_s64_s32(vzip2q_s32(rows[0], rows[1]));
  const int64x2_t low23 = vreinterpretq_s64_s32(vzip1q_s32(rows[2], rows[3]));
  const int64x2_t high23 = vreinterpretq_s64_s32(vzip2q_s32(rows[2], rows[3]));
  rows[0] = vreinterpretq_s32_s64(vzip1q_s64(low01, low23));
  rows[1] = vreinterpretq_s32_s64(vzip2q_s64(low01, low23));
  rows[2] = vreinterpretq_s32_s64(vzip1q_s64(high01, high23));
  rows[3] = vreinterpretq_s32_s64(vzip2q_s64(high01, high23));
}

// Lane j of row i becomes lane i of row j.
inline void transpose(I32 (&rows)[16]) {
  I32 result[16];
  for (int row = 0; row < 4; ++row) {
    for (int column = 0; column < 4; ++column) {
      int32x4_t block[4];
      for (int i = 0; i < 4; ++i) block[i] = rows[4 * row + i].v[column];
      transpose_four(block);
      for (int i = 0; i < 4; ++i) result[4 * column + i].v[row] = block[i];
    }
  }
  for (int i = 0; i < 16; ++i) rows[i] = result[i];
}
inline F32 f16_low(I32 words) {
  return each_quad<F32>(
      [&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vreinterpretq_u32_s32(words.v[i])))); });
}
inline F32 f16_high(I32 words) { return f16_low(shift_right<16>(words)); }

using HalfIn = float;
inline void store_half_n(HalfIn* p, F32 a, int n) { store_n(p, a, n); }

struct HalfLine {
  F32 even, odd;
};
inline HalfLine load_half_line(const void* p) {
  const I32 words = load_i32(p);
  return {as_f32(shift_left<16>(words)), as_f32(bit_and(words, set1_i32(static_cast<std::int32_t>(0xffff0000U))))};
}
inline F32 dot_half(F32 acc, const HalfLine& w, const HalfIn* x) {
  return fma(w.odd, set1(x[1]), fma(w.even, set1(x[0]), acc));
}

inline int8x16_t broadcast_word(const std::int8_t* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

struct Int8Line {
  int8x16_t v[4];  // q, signed
};
inline Int8Line load_int8_line(const void* p) {
  const auto* bytes = static_cast<const std::uint8_t*>(p);
  return each_quad<Int8Line>(
      [=](int i) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(bytes + 16 * i), vdupq_n_u8(0x80))); });
}
inline I32 dot_int8(I32 acc, const Int8Line& w, const std::int8_t* x) {
  const int8x16_t word = broadcast_word(x);
  return each_quad<I32>([&](int i) { return vdotq_s32(acc.v[i], w.v[i], word); });
}

struct Int4Line {
  int8x16_t low[4], high[4];  // q, signed
};
inline Int4Line load_int4_line(const void* p) {
  const auto* bytes = static_cast<const std::uint8_t*>(p);
  const int8x16_t offset = vdupq_n_s8(8);
  Int4Line line;
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t both = vld1q_u8(bytes + 16 * i);
    line.low[i] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), offset);
    line.high[i] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), offset);
  }
  return line;
}
inline I32 dot_int4(I32 acc, const Int4Line& w, const std::int8_t* x) {
  const int8x16_t low = broadcast_word(x);
  const int8x16_t high = broadcast_word(x + 4);
  return each_quad<I32>([&](int i) { return vdotq_s32(vdotq_s32(acc.v[i], w.low[i], low), w.high[i], high); });
}

}  // namespace edgellm::EDGELLM_ISA

// simd.hpp in plain C++: arrays that any compiler can vectorise. Multiply-add rounds twice here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../half.hpp"

namespace edgellm::EDGELLM_ISA {

inline constexpr int kInt4Offset = 0;
inline constexpr int kInt8Offset = 0;
inline constexpr int kTileRows = 4;
inline constexpr int kTilePanels = 1;
inline constexpr int kSingleRowPanels = 4;
inline constexpr int kAskedBytes = 128 << 10;  // ahead of a tile, at most: so much stays in the second cache

struct F32 {
  float v[16];
};
struct I32 {
  std::int32_t v[16];
};

#define EDGELLM_LANES(expression) \
  decltype(lanes_of(a)) r;        \
  for (int i = 0; i < 16; ++i) {  \
    r.v[i] = (expression);        \
  }                               \
  return r

inline F32 lanes_of(const F32& a) { return a; }
inline I32 lanes_of(const I32& a) { return a; }

inline F32 set1(float x) {
  F32 a;
  for (float& lane : a.v) lane = x;
  return a;
}
inline F32 zero() { return set1(0.0F); }
inline F32 load(const float* p) {
  F32 a;
  std::memcpy(a.v, p, sizeof(a.v));
  return a;
}
inline F32 load_n(const float* p, int n) {
  F32 a = zero();
  for (int i = 0; i < n && i < 16; ++i) a.v[i] = p[i];
  return a;
}
inline void store(float* p, F32 a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline void store_n(float* p, F32 a, int n) {
  for (int i = 0; i < n && i < 16; ++i) p[i] = a.v[i];
}
inline F32 add(F32 a, F32 b) { EDGELLM_LANES(a.v[i] + b.v[i]); }
inline F32 sub(F32 a, F32 b) { EDGELLM_LANES(a.v[i] - b.v[i]); }
inline F32 mul(F32 a, F32 b) { EDGELLM_LANES(a.v[i] * b.v[i]); }
inline F32 div(F32 a, F32 b) { EDGELLM_LANES(a.v[i] / b.v[i]); }
inline F32 min(F32 a, F32 b) { EDGELLM_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F32 max(F32 a, F32 b) { EDGELLM_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F32 abs(F32 a) { EDGELLM_LANES(std::fabs(a.v[i])); }
inline F32 fma(F32 a, F32 b, F32 c) { EDGELLM_LANES(a.v[i] * b.v[i] + c.v[i]); }
inline F32 round_even(F32 a) { EDGELLM_LANES(std::nearbyintf(a.v[i])); }
inline F32 first_lanes(F32 a, F32 b, int n) { EDGELLM_LANES(i < n ? a.v[i] : b.v[i]); }
template <int Width>
inline float fold_add(const float* v) {
  float half[Width / 2];
  for (int i = 0; i < Width / 2; ++i) half[i] = v[i] + v[i + Width / 2];
  return fold_add<Width / 2>(half);
}
template <>
inline float fold_add<1>(const float* v) {
  return v[0];
}
inline float reduce_add(F32 a) { return fold_add<16>(a.v); }
inline float reduce_max(F32 a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

inline I32 set1_i32(std::int32_t x) {
  I32 a;
  for (std::int32_t& lane : a.v) lane = x;
  return a;
}
inline I32 load_i32(const void* p) {
  I32 a;
  std::memcpy(a.v, p, sizeof(a.v));
  return a;
}
inline I32 add(I32 a, I32 b) { EDGELLM_LANES(a.v[i] + b.v[i]); }
inline I32 sub(I32 a, I32 b) { EDGELLM_LANES(a.v[i] - b.v[i]); }
inline I32 bit_and(I32 a, I32 b) { EDGELLM_LANES(a.v[i] & b.v[i]); }
template <int N>
inline I32 shift_left(I32 a) {
  EDGELLM_LANES(static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << N));
}
template <int N>
inline I32 shift_right(I32 a) {
  EDGELLM_LANES(static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) >> N));
}
template <int N>
inline I32 shift_right_signed(I32 a) {
  EDGELLM_LANES(a.v[i] >> N);
}
inline F32 to_f32(I32 a) {
  F32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
inline I32 to_i32(F32 a) {
  I32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<std::int32_t>(std::nearbyintf(a.v[i]));
  return r;
}
inline F32 as_f32(I32 a) {
  F32 r;
  std::memcpy(r.v, a.v, sizeof(r.v));
  return r;
}
inline void store_i8_n(std::int8_t* p, I32 a, int n) {
  for (int i = 0; i < n && i < 16; ++i) p[i] = static_cast<std::int8_t>(a.v[i]);
}

inline F32 load_f16(const std::uint16_t* p) {
  F32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = fp16_to_float(p[i]);
  return r;
}
inline F32 load_f16_n(const std::uint16_t* p, int n) {
  F32 r = zero();
  for (int i = 0; i < n && i < 16; ++i) r.v[i] = fp16_to_float(p[i]);
  return r;
}
inline void store_f16_n(std::uint16_t* p, F32 a, int n) {
  for (int i = 0; i < n && i < 16; ++i) p[i] = float_to_fp16(a.v[i]);
}
inline F32 load_i8_n(const std::int8_t* p, int n) {
  F32 r = zero();
  for (int i = 0; i < n && i < 16; ++i) r.v[i] = static_cast<float>(p[i]);
  return r;
}

// The first `n` 32-bit words at p, then zeros; no other memory is touched.
inline I32 load_words_n(const void* p, int n) {
  I32 r = set1_i32(0);
  if (n > 0) std::memcpy(r.v, p, 4 * static_cast<std::size_t>(n < 16 ? n : 16));
  return r;
}

// Lane j of row i becomes lane i of row j.
inline void transpose(I32 (&rows)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const std::int32_t word = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = word;
    }
  }
}
inline F32 f16_low(I32 words) {
  F32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = fp16_to_float(static_cast<std::uint16_t>(words.v[i]));
  return r;
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

struct Int8Line {
  std::uint8_t v[64];
};
inline Int8Line load_int8_line(const void* p) {
  Int8Line line;
  std::memcpy(line.v, p, sizeof(line.v));
  return line;
}
inline I32 dot_int8(I32 acc, const Int8Line& w, const std::int8_t* x) {
  for (int c = 0; c < 16; ++c) {
    for (int j = 0; j < 4; ++j) acc.v[c] += (w.v[4 * c + j] - 128) * x[j];
  }
  return acc;
}

struct Int4Line {
  std::uint8_t v[64];
};
inline Int4Line load_int4_line(const void* p) {
  Int4Line line;
  std::memcpy(line.v, p, sizeof(line.v));
  return line;
}
inline I32 dot_int4(I32 acc, const Int4Line& w, const std::int8_t* x) {
  for (int c = 0; c < 16; ++c) {
    for (int j = 0; j < 4; ++j) {
      acc.v[c] += ((w.v[4 * c + j] & 15) - 8) * x[j] + ((w.v[4 * c + j] >> 4) - 8) * x[4 + j];
    }
  }
  return acc;
}

#undef EDGELLM_LANES

}  // namespace edgellm::EDGELLM_ISA

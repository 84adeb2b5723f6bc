// simd.hpp on AVX-512 with VNNI and BF16: one register per value.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace edgellm::EDGELLM_ISA {

inline constexpr int kInt4Offset = 8;
inline constexpr int kInt8Offset = 128;
inline constexpr int kTileRows = 4;
inline constexpr int kTilePanels = 4;
inline constexpr int kSingleRowPanels = 8;
inline constexpr int kAskedBytes = 512 << 10;  // ahead of a tile, at most: so much stays in the second cache

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};

inline __mmask16 first_mask(int n) { return n >= 16 ? 0xffffU : static_cast<__mmask16>((1U << (n < 0 ? 0 : n)) - 1U); }

inline F32 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32 zero() { return {_mm512_setzero_ps()}; }
inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_mask(n), p)}; }
inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, F32 a, int n) { _mm512_mask_storeu_ps(p, first_mask(n), a.v); }
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 round_even(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 first_lanes(F32 a, F32 b, int n) { return {_mm512_mask_blend_ps(first_mask(n), b.v, a.v)}; }
inline float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }

inline I32 set1_i32(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I32 load_i32(const void* p) { return {_mm512_loadu_si512(p)}; }
inline I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 sub(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32 bit_and(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int N>
inline I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
inline I32 shift_right(I32 a) {
  return {_mm512_srli_epi32(a.v, N)};
}
template <int N>
inline I32 shift_right_signed(I32 a) {
  return {_mm512_srai_epi32(a.v, N)};
}
inline F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 to_i32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F32 as_f32(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
inline void store_i8_n(std::int8_t* p, I32 a, int n) {
  _mm_mask_storeu_epi8(p, first_mask(n), _mm512_cvtepi32_epi8(a.v));
}

inline F32 load_f16(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32 load_f16_n(const std::uint16_t* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_mask(n), p))};
}
inline void store_f16_n(std::uint16_t* p, F32 a, int n) {
  _mm256_mask_storeu_epi16(p, first_mask(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F32 load_i8(const std::int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline F32 load_i8_n(const std::int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_mask(n), p)))};
}

// The first `n` 32-bit words at p, then zeros; no other memory is touched.
inline I32 load_words_n(const void* p, int n) { return {_mm512_maskz_loadu_epi32(first_mask(n), p)}; }

// Lane j of row i becomes lane i of row j.
inline void transpose(I32 (&rows)[16]) {
  __m512i pairs[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i].v, rows[i + 1].v);
  }
  __m512i quads[16];
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low01 = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i].v = _mm512_shuffle_i32x4(low01, low23, 0x88);
    rows[i + 8].v = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    rows[i + 4].v = _mm512_shuffle_i32x4(high01, high23, 0x88);
    rows[i + 12].v = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}
inline F32 f16_low(I32 words) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(words.v))}; }
inline F32 f16_high(I32 words) { return f16_low(shift_right<16>(words)); }

using HalfIn = std::uint16_t;  // bf16 bits
inline void store_half_n(HalfIn* p, F32 a, int n) {
  _mm256_mask_storeu_epi16(p, first_mask(n), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}

inline __m512i broadcast_word(const void* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}

struct HalfLine {
  __m512i v;
};
inline HalfLine load_half_line(const void* p) { return {_mm512_loadu_si512(p)}; }
inline F32 dot_half(F32 acc, const HalfLine& w, const HalfIn* x) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(broadcast_word(x)))};
}

struct Int8Line {
  __m512i v;
};
inline Int8Line load_int8_line(const void* p) { return {_mm512_loadu_si512(p)}; }
inline I32 dot_int8(I32 acc, const Int8Line& w, const std::int8_t* x) {
  return {_mm512_dpbusd_epi32(acc.v, w.v, broadcast_word(x))};
}

struct Int4Line {
  __m512i low, high;
};
inline Int4Line load_int4_line(const void* p) {
  const __m512i line = _mm512_loadu_si512(p);
  const __m512i nibble = _mm512_set1_epi8(15);
  return {_mm512_and_si512(line, nibble), _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble)};
}
inline I32 dot_int4(I32 acc, const Int4Line& w, const std::int8_t* x) {
  acc.v = _mm512_dpbusd_epi32(acc.v, w.low, broadcast_word(x));
  return {_mm512_dpbusd_epi32(acc.v, w.high, broadcast_word(x + 4))};
}

}  // namespace edgellm::EDGELLM_ISA

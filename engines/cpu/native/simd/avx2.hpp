// simd.hpp on AVX2 with FMA and F16C: two registers per value.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace edgellm::EDGELLM_ISA {

inline constexpr int kInt4Offset = 8;
inline constexpr int kInt8Offset = 0;
inline constexpr int kTileRows = 4;
inline constexpr int kTilePanels = 1;
inline constexpr int kSingleRowPanels = 4;
inline constexpr int kAskedBytes = 128 << 10;  // ahead of a tile, at most: so much stays in the second cache

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};

inline __m256i first_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32 load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, first_mask(n)), _mm256_maskload_ps(p + 8, first_mask(n - 8))};
}
inline void store(float* p, F32 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_n(float* p, F32 a, int n) {
  _mm256_maskstore_ps(p, first_mask(n), a.lo);
  _mm256_maskstore_ps(p + 8, first_mask(n - 8), a.hi);
}
inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32 abs(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0F);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F32 round_even(F32 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline F32 first_lanes(F32 a, F32 b, int n) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(first_mask(n))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(first_mask(n - 8)))};
}
inline float reduce_add(F32 a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(F32 a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline I32 set1_i32(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I32 load_i32(const void* p) {
  const auto* words = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
}
inline I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline I32 sub(I32 a, I32 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline I32 bit_and(I32 a, I32 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
template <int N>
inline I32 shift_left(I32 a) {
  return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
template <int N>
inline I32 shift_right(I32 a) {
  return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)};
}
template <int N>
inline I32 shift_right_signed(I32 a) {
  return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)};
}
inline F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I32 to_i32(F32 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline F32 as_f32(I32 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

// The low 16 bits of each lane, in lane order; lanes must be in [0, 65535].
inline __m256i pack_u16(I32 a) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0b11011000); }

template <class T>
inline void copy_first(T* p, const void* lanes, int n) {
  std::memcpy(p, lanes, (n >= 16 ? 16U : static_cast<unsigned>(n < 0 ? 0 : n)) * sizeof(T));
}
inline void store_i8_n(std::int8_t* p, I32 a, int n) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0b11011000);
  alignas(16) std::int8_t lanes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes),
                  _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  copy_first(p, lanes, n);
}

inline F32 load_f16(const std::uint16_t* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline F32 load_f16_n(const std::uint16_t* p, int n) {
  alignas(32) std::uint16_t lanes[16] = {};
  copy_first(lanes, p, n);
  return load_f16(lanes);
}
inline void store_f16_n(std::uint16_t* p, F32 a, int n) {
  alignas(16) std::uint16_t lanes[16];
  auto* halves = reinterpret_cast<__m128i*>(lanes);
  _mm_store_si128(halves, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_store_si128(halves + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  copy_first(p, lanes, n);
}
inline F32 load_i8_n(const std::int8_t* p, int n) {
  alignas(16) std::int8_t lanes[16] = {};
  copy_first(lanes, p, n);
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
  return to_f32({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
}

// The first `n` 32-bit words at p, then zeros; no other memory is touched.
inline I32 load_words_n(const void* p, int n) {
  const int* words = static_cast<const int*>(p);
  return {_mm256_maskload_epi32(words, first_mask(n)), _mm256_maskload_epi32(words + 8, first_mask(n - 8))};
}

// Lane j of row i becomes lane i of row j, for eight rows of eight.
inline void transpose_eight(__m256i (&rows)[8]) {
  __m256i quads[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256i low01 = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    const __m256i high01 = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m256i low23 = _mm256_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m256i high23 = _mm256_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    quads[i] = _mm256_unpacklo_epi64(low01, low23);
    quads[i + 1] = _mm256_unpackhi_epi64(low01, low23);
    quads[i + 2] = _mm256_unpacklo_epi64(high01, high23);
    quads[i + 3] = _mm256_unpackhi_epi64(high01, high23);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
  }
}

// Lane j of row i becomes lane i of row j.
inline void transpose(I32 (&rows)[16]) {
  __m256i blocks[2][2][8];  // [upper, lower rows][left, right lanes]
  for (int i = 0; i < 16; ++i) {
    blocks[i / 8][0][i % 8] = rows[i].lo;
    blocks[i / 8][1][i % 8] = rows[i].hi;
  }
  for (auto& row : blocks) {
    for (auto& block : row) transpose_eight(block);
  }
  for (int i = 0; i < 16; ++i) rows[i] = {blocks[0][i / 8][i % 8], blocks[1][i / 8][i % 8]};
}
inline F32 f16_from_words(I32 words) {
  const __m256i halves = pack_u16(words);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
inline F32 f16_low(I32 words) { return f16_from_words(bit_and(words, set1_i32(0xffff))); }
inline F32 f16_high(I32 words) { return f16_from_words(shift_right<16>(words)); }

using HalfIn = float;
inline void store_half_n(HalfIn* p, F32 a, int n) { store_n(p, a, n); }

inline __m256i broadcast_word(const void* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return _mm256_set1_epi32(word);
}

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
  __m256i lo, hi;  // q, signed
};
inline Int8Line load_int8_line(const void* p) {
  const I32 line = load_i32(p);
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  return {_mm256_xor_si256(line.lo, flip), _mm256_xor_si256(line.hi, flip)};
}
// |x| * (w with the sign of x): 2 * 127 * 127 fits the saturating 16-bit pair sum, which u8 * s8 would not.
inline __m256i dot_signed(__m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
inline I32 dot_int8(I32 acc, const Int8Line& w, const std::int8_t* x) {
  const __m256i word = broadcast_word(x);
  return {_mm256_add_epi32(acc.lo, dot_signed(w.lo, word)), _mm256_add_epi32(acc.hi, dot_signed(w.hi, word))};
}

struct Int4Line {
  I32 low, high;
};
inline Int4Line load_int4_line(const void* p) {
  const I32 line = load_i32(p);
  const I32 nibble = {_mm256_set1_epi8(15), _mm256_set1_epi8(15)};
  return {bit_and(line, nibble), bit_and(shift_right<4>(line), nibble)};
}
inline __m256i dot_nibbles(__m256i low, __m256i high, __m256i x_low, __m256i x_high) {
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low), _mm256_maddubs_epi16(high, x_high));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
inline I32 dot_int4(I32 acc, const Int4Line& w, const std::int8_t* x) {
  const __m256i x_low = broadcast_word(x);
  const __m256i x_high = broadcast_word(x + 4);
  return {_mm256_add_epi32(acc.lo, dot_nibbles(w.low.lo, w.high.lo, x_low, x_high)),
          _mm256_add_epi32(acc.hi, dot_nibbles(w.low.hi, w.high.hi, x_low, x_high))};
}

}  // namespace edgellm::EDGELLM_ISA

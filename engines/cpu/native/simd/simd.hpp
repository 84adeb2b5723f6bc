// Sixteen lanes on every instruction set, so that a kernel is written once. `F32` is 16 floats, `I32` 16 int32; a
// narrower machine holds them in several registers. Each translation unit is compiled once per instruction set, with
// EDGELLM_ISA naming the namespace all of this lives in.
//
// Weight lines (64 bytes, 16 output columns) and the dot products over them:
//   HalfLine  bf16 [16 columns][2 channels]           dot_half: acc[c] += sum over 2 channels
//   Int8Line  u8   [16 columns][4 channels], q + 128  dot_int8: acc[c] += sum over 4 channels
//   Int4Line  u8   [16 columns][4], q[j] + 8 in the low nibble, q[4 + j] + 8 in the high one; 8 channels
// Where the machine multiplies unsigned weights, the dot is too large by kInt8Offset (kInt4Offset) times the sum of
// the activations; elsewhere the offset is zero. `HalfIn` is what a half-precision activation is stored as.
#pragma once

#if defined(EDGELLM_SIMD_AVX512)
#include "avx512.hpp"
#elif defined(EDGELLM_SIMD_AVX2)
#include "avx2.hpp"
#elif defined(EDGELLM_SIMD_NEON)
#include "neon.hpp"
#else
#include "portable.hpp"
#endif

namespace edgellm::EDGELLM_ISA {

inline constexpr int kLanes = 16;
inline constexpr int kLineBytes = 64;

}  // namespace edgellm::EDGELLM_ISA

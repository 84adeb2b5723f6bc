// exp and erf over lanes, the same result in every lane position.
#pragma once

#include "simd.hpp"

namespace edgellm::EDGELLM_ISA {

// exp(x), relative error about 2e-7; x is clamped to [-87, 88]. 2^n * p(r) with r = x - n ln 2 in [-ln2/2, ln2/2] and
// the Taylor polynomial of degree 7.
inline F32 exp(F32 x) {
  const F32 clamped = min(max(x, set1(-87.0F)), set1(88.0F));
  const F32 n = round_even(mul(clamped, set1(1.44269504F)));
  const F32 r = fma(n, set1(2.12194440e-4F), fma(n, set1(-0.693359375F), clamped));
  F32 p = set1(1.0F / 5040.0F);
  p = fma(p, r, set1(1.0F / 720.0F));
  p = fma(p, r, set1(1.0F / 120.0F));
  p = fma(p, r, set1(1.0F / 24.0F));
  p = fma(p, r, set1(1.0F / 6.0F));
  p = fma(p, r, set1(0.5F));
  p = fma(p, r, set1(1.0F));
  p = fma(p, r, set1(1.0F));
  return mul(p, as_f32(shift_left<23>(add(to_i32(n), set1_i32(127)))));
}

// 1 / (1 + exp(-x)).
inline F32 sigmoid(F32 x) { return div(set1(1.0F), add(set1(1.0F), exp(sub(zero(), x)))); }

// 1 - erf(|x|), absolute error 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
inline F32 erfc_abs(F32 x) {
  const F32 magnitude = abs(x);
  const F32 t = div(set1(1.0F), fma(magnitude, set1(0.3275911F), set1(1.0F)));
  F32 p = set1(1.061405429F);
  p = fma(p, t, set1(-1.453152027F));
  p = fma(p, t, set1(1.421413741F));
  p = fma(p, t, set1(-0.284496736F));
  p = fma(p, t, set1(0.254829592F));
  return mul(mul(p, t), exp(sub(zero(), mul(magnitude, magnitude))));
}

}  // namespace edgellm::EDGELLM_ISA

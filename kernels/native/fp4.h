// Dot products with packed FP4 rows, which are unpacked in registers. Layout in common.h defines the bytes of a row.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common.h"

namespace fiftyfold {

constexpr int64_t kFp4Block = 32;

#if defined(__AVX2__)
// Twice the values of 16 E2M1 codes, one per byte.
inline Floats doubled_e2m1(__m128i codes) {
  const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m128i values = _mm_shuffle_epi8(table, codes);
  Floats v;
#if defined(__AVX512F__)
  const __m512 lanes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values));
  std::memcpy(&v, &lanes, sizeof(v));
#else
  const __m256 lanes[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)),
                           _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(values, 8)))};
  std::memcpy(&v, lanes, sizeof(v));
#endif
  return v;
}
#endif

// Set `even` and `odd` to twice the values of the low and high nibbles of 16 bytes.
inline void doubled_e2m1(const uint8_t* bytes, Floats& even, Floats& odd) {
#if defined(__AVX2__)
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), low = _mm_set1_epi8(15);
  even = doubled_e2m1(_mm_and_si128(codes, low));
  odd = doubled_e2m1(_mm_and_si128(_mm_srli_epi16(codes, 4), low));
#else
  for (int64_t i = 0; i < 16; ++i) {
    even[i] = 2.0f * from_e2m1(bytes[i] & 15);
    odd[i] = 2.0f * from_e2m1(bytes[i] >> 4);
  }
#endif
}

// Reorder every block of 32 elements for packed_dot: even indices before odd ones. n is a multiple of 32.
inline void separate_even_odd(const float* x, int64_t n, float* out) {
  for (int64_t b = 0; b < n; b += kFp4Block) {
    for (int64_t i = 0; i < kFp4Block / 2; ++i) {
      out[b + i] = x[b + 2 * i];
      out[b + kFp4Block / 2 + i] = x[b + 2 * i + 1];
    }
  }
}

// Dot products of T vectors, reordered by separate_even_odd, with one packed row of n FP4 values.
template <int T>
inline void packed_dots(const float* const* x, const uint8_t* row, int64_t n, float* out) {
  const uint8_t* scales = row + n / 2;
  Floats sums[T][2] = {};
  for (int64_t b = 0; b < n / kFp4Block; ++b) {
    Floats even, odd;
    doubled_e2m1(row + b * (kFp4Block / 2), even, odd);
    const float scale = 0.5f * e8m0_to_float(scales[b]);
    even *= scale;
    odd *= scale;
    for (int t = 0; t < T; ++t) {
      const float* from = x[t] + b * kFp4Block;
      sums[t][b % 2] += load16(from) * even + load16(from + kFp4Block / 2) * odd;
    }
  }
  for (int t = 0; t < T; ++t) out[t] = sum_of(sums[t][0] + sums[t][1]);
}

}  // namespace fiftyfold

// Dot products with packed FP4 rows, which are unpacked in registers. Layout in common.h defines the bytes of a row.
#pragma once

#include "common.h"

namespace fiftyfold {

constexpr int64_t kFp4Block = 32;

// Set `even` and `odd` to twice the values of the low and high nibbles of 16 bytes.
#if defined(__AVX512F__)
inline void doubled_e2m1(const uint8_t* bytes, Floats& even, Floats& odd) {
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  even = (Floats)_mm512_permutexvar_ps(codes, table);  // by the lowest four bits
  odd = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table);
}
#elif defined(__AVX2__)
inline Floats doubled_e2m1(__m128i codes) {
  const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m128i values = _mm_shuffle_epi8(table, codes);
  return {(Floats8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)),
          (Floats8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(values, 8)))};
}

inline void doubled_e2m1(const uint8_t* bytes, Floats& even, Floats& odd) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), low = _mm_set1_epi8(15);
  even = doubled_e2m1(_mm_and_si128(codes, low));
  odd = doubled_e2m1(_mm_and_si128(_mm_srli_epi16(codes, 4), low));
}
#else
inline Floats doubled_e2m1(uint8x16_t codes) {
  const int8x16_t table = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const int8x16_t values = vqtbl1q_s8(table, codes);
  const int16x8_t low = vmovl_s8(vget_low_s8(values)), high = vmovl_s8(vget_high_s8(values));
  const auto four = [](int16x4_t v) { return (Floats4)vcvtq_f32_s32(vmovl_s16(v)); };
  return {{four(vget_low_s16(low)), four(vget_high_s16(low))}, {four(vget_low_s16(high)), four(vget_high_s16(high))}};
}

inline void doubled_e2m1(const uint8_t* bytes, Floats& even, Floats& odd) {
  const uint8x16_t codes = vld1q_u8(bytes);
  even = doubled_e2m1(vandq_u8(codes, vdupq_n_u8(15)));
  odd = doubled_e2m1(vshrq_n_u8(codes, 4));
}
#endif

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
  Floats sums[2 * T];
  unrolled<2 * T>([&](auto i) { sums[i] = Floats{}; });
  const auto add = [&](int64_t b, auto parity) __attribute__((always_inline)) {
    Floats even, odd;
    doubled_e2m1(row + b * (kFp4Block / 2), even, odd);
    const float scale = 0.5f * e8m0_to_float(scales[b]);
    unrolled<T>([&](auto t) {
      const float* from = x[t] + b * kFp4Block;
      sums[2 * t + parity] += (load16(from) * even + load16(from + kFp4Block / 2) * odd) * scale;
    });
  };
  const int64_t blocks = n / kFp4Block;
  for (int64_t b = 0; b + 2 <= blocks; b += 2) unrolled<2>([&](auto parity) { add(b + parity, parity); });
  if (blocks % 2) add(blocks - 1, std::integral_constant<int, 0>{});
  unrolled<T>([&](auto t) { out[t] = sum_of(sums[2 * t] + sums[2 * t + 1]); });
}

}  // namespace fiftyfold

// Vectors of 16 floats for all instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fiftyfold {

// Call f(0), ..., f(N - 1) with constants. Loops are unrolled too late for arrays of vectors to be kept in registers.
template <int N, typename F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

using Floats4 = float __attribute__((vector_size(16)));

// Two vectors as one. Compilers keep this struct in registers. They would keep a vector type wider than a register in memory.
template <typename Half>
struct Joined {
  Half low, high;

  float operator[](int64_t lane) const {
    constexpr int64_t kHalf = sizeof(Half) / sizeof(float);
    return lane < kHalf ? low[lane] : high[lane - kHalf];
  }
  friend Joined operator+(Joined a, Joined b) { return {a.low + b.low, a.high + b.high}; }
  friend Joined operator-(Joined a, Joined b) { return {a.low - b.low, a.high - b.high}; }
  friend Joined operator*(Joined a, Joined b) { return {a.low * b.low, a.high * b.high}; }
  friend Joined operator/(Joined a, Joined b) { return {a.low / b.low, a.high / b.high}; }
  friend Joined operator+(Joined a, float b) { return {a.low + b, a.high + b}; }
  friend Joined operator*(Joined a, float b) { return {a.low * b, a.high * b}; }
  friend Joined operator-(float a, Joined b) { return {a - b.low, a - b.high}; }
  friend Joined operator*(float a, Joined b) { return {a * b.low, a * b.high}; }
  friend Joined operator/(float a, Joined b) { return {a / b.low, a / b.high}; }
  Joined& operator+=(Joined b) { return *this = *this + b; }
  Joined& operator-=(Joined b) { return *this = *this - b; }
  Joined& operator*=(Joined b) { return *this = *this * b; }
  Joined& operator*=(float b) { return *this = *this * b; }
  Joined& operator/=(Joined b) { return *this = *this / b; }
};

#if defined(__AVX512F__)
using Floats8 = float __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(64)));
using Register = Floats;
#elif defined(__AVX2__)
using Floats8 = float __attribute__((vector_size(32)));
using Floats = Joined<Floats8>;
using Register = Floats8;
#else
using Floats8 = Joined<Floats4>;
using Floats = Joined<Floats8>;
using Register = Floats4;
#endif
static_assert(sizeof(Floats) == 16 * sizeof(float));

inline Register larger_of(Register a, Register b) { return a > b ? a : b; }

template <typename Half>
inline Joined<Half> larger_of(Joined<Half> a, Joined<Half> b) {
  return {larger_of(a.low, b.low), larger_of(a.high, b.high)};
}

inline Register load_register(const float* p) {
  Register v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Widen BF16 elements.
inline Register load_register(const uint16_t* bf16) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
  return (Register)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif defined(__AVX2__)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
  return (Register)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  return (Register)vshll_n_u16(vld1_u16(bf16), 16);
#endif
}

// Load one register after another, because a copy of a whole Joined would go through memory.
template <typename V, typename T>
inline V load(const T* p) {
  if constexpr (std::is_same_v<V, Register>) {
    return load_register(p);
  } else {
    using Half = decltype(V::low);
    return {load<Half>(p), load<Half>(p + sizeof(Half) / sizeof(float))};
  }
}

template <typename V>
inline void store(V v, float* p) {
  if constexpr (std::is_same_v<V, Register>) {
    std::memcpy(p, &v, sizeof(v));
  } else {
    store(v.low, p);
    store(v.high, p + sizeof(v.low) / sizeof(float));
  }
}

// float32 or BF16.
template <typename T>
inline Floats load16(const T* p) {
  return load<Floats>(p);
}

// Sum the lanes by halves: lane i and lane i + 8, then i + 4, i + 2 and i + 1.
inline float sum_of(Floats4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }

#if defined(__AVX2__)
inline float sum_of(Floats8 v) {
  Joined<Floats4> halves;
  std::memcpy(&halves, &v, sizeof(v));
  return sum_of(halves.low + halves.high);
}
#endif

#if defined(__AVX512F__)
inline float sum_of(Floats v) {
  Joined<Floats8> halves;
  std::memcpy(&halves, &v, sizeof(v));
  return sum_of(halves.low + halves.high);
}
#else
template <typename Half>
inline float sum_of(Joined<Half> v) {
  return sum_of(v.low + v.high);
}
#endif

}  // namespace fiftyfold

// Operations on rows of few tokens, shared by several operators.
#pragma once

#include "common.h"

namespace fiftyfold {

struct Rows {
  float* data;
  int64_t count, stride;
};

// Products of a block of tokens with a block of weight rows are computed together, so that loads are shared. Accumulators
// of both blocks must fit the registers.
#if defined(__AVX512F__)
constexpr int kTokenBlock = 4, kRowBlock = 4;
#else
constexpr int kTokenBlock = 2, kRowBlock = 2;
#endif

// to[t, o] = from[t] . w[o] for a block of T tokens and R rows. n is a multiple of 16. Not inlined: within a large function
// the compiler would keep the sums in memory.
template <int T, int R, typename W>
[[gnu::noinline]] void multiply_block(const Rows& from, int64_t t, const W* w, int64_t n, const Rows& to, int64_t o) {
  Floats sums[T * R];
  unrolled<T * R>([&](auto i) { sums[i] = Floats{}; });
  for (int64_t i = 0; i < n; i += 16) {
    Floats x[T];
    unrolled<T>([&](auto a) { x[a] = load16(from.data + (t + a) * from.stride + i); });
    unrolled<R>([&](auto b) {
      const Floats row = load16(w + (o + b) * n + i);
      unrolled<T>([&](auto a) { sums[a * R + b] += x[a] * row; });
    });
  }
  unrolled<T>([&](auto a) {
    unrolled<R>([&](auto b) { to.data[(t + a) * to.stride + o + b] = sum_of(sums[a * R + b]); });
  });
}

// to[t, o] = from[t] . w[o] for the rows [begin, end) of weights. Reads every row of weights once for all tokens.
template <typename W>
inline void multiply_rows(const Rows& from, const W* w, int64_t in, int64_t begin, int64_t end, const Rows& to) {
  if (from.count < kTokenBlock || in % 16) {  // too few tokens: bound by reading the weights
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t t = 0; t < from.count; ++t) {
        to.data[t * to.stride + o] = streamed_dot(from.data + t * from.stride, w + o * in, in);
      }
    }
    return;
  }
  const int64_t whole = from.count / kTokenBlock * kTokenBlock;
  for (int64_t o = begin; o < end; o += kRowBlock) {
    const int64_t rows = std::min<int64_t>(kRowBlock, end - o);
    for (int64_t t = 0; t < whole; t += kTokenBlock) {
      if (rows == kRowBlock) {
        multiply_block<kTokenBlock, kRowBlock>(from, t, w, in, to, o);
      } else {
        for (int64_t b = 0; b < rows; ++b) multiply_block<kTokenBlock, 1>(from, t, w, in, to, o + b);
      }
    }
    for (int64_t t = whole; t < from.count; ++t) {
      for (int64_t b = 0; b < rows; ++b) multiply_block<1, 1>(from, t, w, in, to, o + b);
    }
  }
}

// to[t, o] = from[t] . w[o] for all `out` rows of weights, in parallel.
template <typename W>
inline void multiply(const Rows& from, const W* w, int64_t in, int64_t out, const Rows& to) {
  const int64_t step = from.count < kTokenBlock ? 1 : kRowBlock;
  parallel_rows((out + step - 1) / step, step * in * from.count, [&](int64_t block) {
    multiply_rows(from, w, in, block * step, std::min(out, (block + 1) * step), to);
  });
}

inline void multiply(Rows from, const Tensor& weight, int64_t group, Rows to) {
  const int64_t out = weight.size(-2), in = weight.size(-1), begin = group * weight.stride(0);
  if (weight.scalar_type() == at::kFloat) {
    multiply(from, weight.const_data_ptr<float>() + begin, in, out, to);
  } else {
    const auto* w = reinterpret_cast<const uint16_t*>(weight.const_data_ptr<BFloat16>());
    multiply(from, w + begin, in, out, to);
  }
}

// row / rms(row), multiplied by the optional `gains`. `out` may alias `row`.
template <typename T>
inline void normalize_row(const T* row, int64_t n, const float* gains, float eps, float* out) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(row, n) / static_cast<float>(n) + eps);
  if (gains) {
    for (int64_t i = 0; i < n; ++i) out[i] = widen(row[i]) * scale * gains[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = widen(row[i]) * scale;
  }
}

// Rotate the pairs of the last 2r dims and copy the others. `out` may alias `row`.
template <typename T>
inline void rotate_row(const T* row, int64_t n, const float* cos, const float* sin, int64_t r, float sign, float* out) {
  const int64_t passed = n - 2 * r;
  if (static_cast<const void*>(out) != row) {
    for (int64_t i = 0; i < passed; ++i) out[i] = widen(row[i]);
  }
  for (int64_t i = 0; i < r; ++i) {
    const float even = widen(row[passed + 2 * i]), odd = widen(row[passed + 2 * i + 1]);
    const float cosine = cos[i], sine = sign * sin[i];
    out[passed + 2 * i] = even * cosine - odd * sine;
    out[passed + 2 * i + 1] = even * sine + odd * cosine;
  }
}

// Orthonormal Walsh-Hadamard rotation in place. n is a power of two.
inline void hadamard_row(float* row, int64_t n) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  for (int64_t i = 0; i < n; ++i) row[i] *= scale;
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t begin = 0; begin < n; begin += 2 * half) {
#pragma omp simd
      for (int64_t i = begin; i < begin + half; ++i) {
        const float a = row[i], b = row[i + half];
        row[i] = a + b;
        row[i + half] = a - b;
      }
    }
  }
}

// Cosines and sines, float32 [B or 1, S, r], for the tokens of a batch [B, S].
struct Angles {
  const float *cos, *sin;
  int64_t tokens, r;
  bool shared;

  Angles(const Tensor& cosines, const Tensor& sines, int64_t B, int64_t S)
      : cos(cosines.const_data_ptr<float>()), sin(sines.const_data_ptr<float>()), tokens(S), r(cosines.size(2)),
        shared(cosines.size(0) == 1) {
    TORCH_CHECK_VALUE(cosines.is_contiguous() && sines.is_contiguous() && cosines.sizes() == sines.sizes() &&
                          cosines.size(1) == S && (shared || cosines.size(0) == B),
                      "rotate: cos ", cosines.sizes(), " does not match ", B, " x ", S, " tokens");
  }

  template <typename T>
  void rotate(int64_t token, const T* row, int64_t n, bool inverse, float* out) const {
    const int64_t place = (shared ? token % tokens : token) * r;
    rotate_row(row, n, cos + place, sin + place, r, inverse ? -1.0f : 1.0f, out);
  }
};

}  // namespace fiftyfold

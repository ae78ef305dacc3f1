// Helpers shared by the native CPU operators: checks, dot products and number formats.
//
// The sources are compiled once per instruction set (see build.py). Loops are written for vectorization by the compiler.
// Only sums with `#pragma omp simd reduction` may be reordered.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace fiftyfold {

using at::Tensor;
using c10::BFloat16;

inline Tensor contiguous_float(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, name, ": expected float32, found ", x.scalar_type());
  return x.contiguous();
}

inline Tensor contiguous_float_or_bf16(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, name,
                    ": expected float32 or bfloat16, found ", x.scalar_type());
  return x.contiguous();
}

// One number per sequence, from int64 [sequences or 1].
inline std::vector<int64_t> per_sequence(const Tensor& numbers, int64_t sequences, const char* name) {
  TORCH_CHECK_VALUE(numbers.scalar_type() == at::kLong && numbers.dim() == 1 && numbers.is_contiguous() &&
                        (numbers.size(0) == sequences || numbers.size(0) == 1),
                    name, ": expected int64 [", sequences, " or 1], found ", numbers.scalar_type(), " ", numbers.sizes());
  const int64_t* values = numbers.const_data_ptr<int64_t>();
  std::vector<int64_t> found(sequences);
  for (int64_t b = 0; b < sequences; ++b) found[b] = values[numbers.size(0) == 1 ? 0 : b];
  return found;
}

// Elements of a tensor as T: float, or the bits of BF16.
template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* mutable_data_of(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Call f.template operator()<T>() for the element type T of x.
template <typename F>
void by_type(const Tensor& x, F f) {
  if (x.scalar_type() == at::kFloat) {
    f.template operator()<float>();
  } else {
    f.template operator()<uint16_t>();
  }
}

inline int64_t rows_of(const Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

// --- bits

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(uint16_t bf16) { return float_of(static_cast<uint32_t>(bf16) << 16); }

inline uint16_t round_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return 0x7FC0;
  return static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

template <typename T>
inline T narrowed(float x) {
  if constexpr (sizeof(T) == 2) {
    return round_to_bf16(x);
  } else {
    return x;
  }
}

// --- sums

template <typename W>
inline float dot(const float* __restrict x, const W* __restrict w, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * widen(w[i]);
  return sum;
}

// Dot product with a matrix row in main memory. Prefetches kAhead bytes, because rows are too short for the hardware
// prefetcher.
template <typename W>
inline float streamed_dot(const float* __restrict x, const W* __restrict w, int64_t n) {
  constexpr int64_t kAhead = 2048;
  Floats s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int64_t line = 0; line < static_cast<int64_t>(64 * sizeof(W)); line += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAhead + line);
    }
    s0 += load16(x + i) * load16(w + i);
    s1 += load16(x + i + 16) * load16(w + i + 16);
    s2 += load16(x + i + 32) * load16(w + i + 32);
    s3 += load16(x + i + 48) * load16(w + i + 48);
  }
  for (; i + 16 <= n; i += 16) s0 += load16(x + i) * load16(w + i);
  float sum = sum_of((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) sum += x[i] * widen(w[i]);
  return sum;
}

// Dot products with four matrix rows, `stride` elements apart. Independent sums hide latency and share the loads of x.
template <typename W>
inline void dot4(const float* __restrict x, const W* __restrict w, int64_t stride, int64_t n, float* __restrict out) {
  const W *w0 = w, *w1 = w + stride, *w2 = w + 2 * stride, *w3 = w + 3 * stride;
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < n; ++i) {
    s0 += x[i] * widen(w0[i]);
    s1 += x[i] * widen(w1[i]);
    s2 += x[i] * widen(w2[i]);
    s3 += x[i] * widen(w3[i]);
  }
  out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

template <typename T>
inline float sum_of_squares(const T* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += widen(x[i]) * widen(x[i]);
  return sum;
}

// Propagates NaN like torch.amax: NaN has the largest bits.
inline float largest_magnitude(const float* x, int64_t n) {
  uint32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = std::max(most, bits_of(x[i]) & 0x7FFFFFFFu);
  return float_of(most);
}

// exp(x) with an error of about one unit in the last place, without branches (polynomial from Cephes). 0 below -87.3.
inline float exp_of(float x) {
  const float clamped = std::min(88.3762626647949f, std::max(-87.3365447505f, x));
  const float n = std::nearbyint(clamped * 1.44269504088896341f);
  const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  const float result = x < -87.3365447505f ? 0.0f : p * scale;
  return x != x ? x : result;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// silu(gate) * up with clamped inputs, as in kernels/swiglu.
inline float swiglu_of(float gate, float up, float limit) {
  // These comparisons preserve NaN.
  const float g = gate > limit ? limit : gate, u = up > limit ? limit : (up < -limit ? -limit : up);
  return g * sigmoid(g) * u;
}

// --- number formats, equal to kernels/formats.py bit for bit

enum Format : int64_t { kFp32 = 0, kBf16 = 1, kFp8 = 2, kFp4 = 3, kFp8Wide = 4 };

inline bool is_fp8(int64_t format) { return format == kFp8 || format == kFp8Wide; }

// Dims that share a scale, for formats with scales.
inline int64_t block_of(int64_t format) { return format == kFp4 ? 32 : format == kFp8 ? 64 : 128; }

inline uint8_t e8m0_from_amax(float amax, float grid_max, float floor) {
  const uint32_t u = bits_of(std::max(amax, floor) / grid_max);
  const int32_t exponent = static_cast<int32_t>(u >> 23) + ((u & 0x7FFFFF) != 0);
  return static_cast<uint8_t>(std::min(254, std::max(1, exponent)));
}

inline float e8m0_to_float(uint8_t exponent) {
  return float_of(std::max<uint32_t>(static_cast<uint32_t>(exponent) << 23, 1u << 22));
}

// Biased exponent of the scale of a block with the largest magnitude `amax`.
inline uint8_t scale_exponent(float amax, int64_t format) {
  return is_fp8(format) ? e8m0_from_amax(amax, 448.0f, 1e-4f) : e8m0_from_amax(amax, 6.0f, 6.0f * 0x1p-126f);
}

inline uint8_t to_e4m3(float x) {  // round to nearest even, saturating at 448
  const uint32_t sign = (bits_of(x) >> 24) & 0x80;
  const float a = std::min(std::fabs(x), 448.0f);
  const uint32_t u = bits_of(a);
  const uint32_t normal = ((u + 0x7FFFF + ((u >> 20) & 1)) >> 20) - (120 << 3);
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(std::nearbyint(a * 512.0f)));
  const uint32_t code = a < 0.015625f ? subnormal : normal;
  return static_cast<uint8_t>(sign | (x != x ? 0x7F : code));
}

inline float from_e4m3(uint8_t code) {
  const uint32_t magnitude = static_cast<uint32_t>(code & 0x7F) << 20;
  const float normal = float_of(magnitude + (120u << 23));
  const float subnormal = float_of(magnitude + (121u << 23)) - 0.015625f;
  const float a = (code & 0x78) ? normal : subnormal;
  return float_of(bits_of(a) | (static_cast<uint32_t>(code & 0x80) << 24));
}

inline float round_to_e2m1(float x) {
  const float a = std::min(std::fabs(x), 6.0f);
  const float step = a < 2.0f ? 0.5f : (a < 4.0f ? 1.0f : 2.0f);
  return std::copysign(std::nearbyint(a / step) * step, x);
}

inline uint8_t to_e2m1(float on_grid) {
  const float a = std::fabs(on_grid);
  const float code = a <= 2.0f ? a * 2.0f : (a < 6.0f ? a + 2.0f : 7.0f);
  return static_cast<uint8_t>(static_cast<int32_t>(code) | ((bits_of(on_grid) >> 28) & 8));
}

inline float from_e2m1(uint32_t code) {
  const uint32_t exponent = (code >> 1) & 3, mantissa = code & 1;
  const float a = exponent ? float_of(((exponent + 126) << 23) | (mantissa << 22)) : 0.5f * static_cast<float>(mantissa);
  return float_of(bits_of(a) | ((code & 8) << 28));
}

// Layout of a packed row, [ body | rope | scales | padding ], as kernels.cache_io.EntryLayout defines it.
struct Layout {
  int64_t body, body_format, rope, rope_format, block, scales, body_bytes, rope_bytes, scale_offset;

  explicit Layout(at::IntArrayRef spec) {
    TORCH_CHECK_VALUE(spec.size() == 4, "layout: expected 4 numbers (body dims, body format, rope dims, rope format)");
    TORCH_CHECK_VALUE(spec[0] >= 1 && spec[2] >= 0 && spec[3] <= kBf16 && (spec[1] != kFp4 || spec[0] % 2 == 0),
                      "layout: unsupported layout of ", spec[0], " body dims and ", spec[2], " rope dims");
    body = spec[0], body_format = spec[1], rope = spec[2], rope_format = spec[3];
    block = std::min<int64_t>(block_of(body_format), body);
    scales = body_format >= kFp8 ? (body + block - 1) / block : 0;
    body_bytes = bytes(body, body_format), rope_bytes = bytes(rope, rope_format);
    scale_offset = aligned(body_bytes + rope_bytes, scale_bytes());
  }

  static int64_t bytes(int64_t n, int64_t format) {
    return format == kFp32 ? 4 * n : format == kBf16 ? 2 * n : format == kFp4 ? n / 2 : n;
  }

  static int64_t aligned(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

  int64_t size() const { return body + rope; }

  int64_t scale_bytes() const { return body_format == kFp8Wide ? 4 : 1; }

  int64_t nbytes() const {
    const int64_t used = scale_offset + scales * scale_bytes();
    return aligned(used, body_format == kFp32 || rope_format == kFp32 || body_format == kFp8Wide ? 4 : 2);
  }

  float read_scale(const uint8_t* row, int64_t b) const {
    if (body_format != kFp8Wide) return e8m0_to_float(row[scale_offset + b]);
    float scale;
    std::memcpy(&scale, row + scale_offset + 4 * b, 4);
    return scale;
  }

  // Store the scale with a biased exponent and return its value.
  float write_scale(uint8_t* row, int64_t b, uint8_t exponent) const {
    const float scale = e8m0_to_float(exponent);
    if (body_format == kFp8Wide) {
      std::memcpy(row + scale_offset + 4 * b, &scale, 4);
    } else {
      row[scale_offset + b] = exponent;
    }
    return scale;
  }
};

inline void unpack_plain(const uint8_t* row, int64_t n, int64_t format, float* out) {
  if (format == kFp32) {
    std::memcpy(out, row, 4 * n);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, row + 2 * i, 2);
    out[i] = widen(half);
  }
}

inline void unpack_row(const uint8_t* __restrict row, const Layout& layout, float* __restrict out) {
  if (layout.body_format < kFp8) {
    unpack_plain(row, layout.body, layout.body_format, out);
  } else {
    for (int64_t b = 0; b < layout.scales; ++b) {
      const int64_t begin = b * layout.block, end = std::min(layout.body, begin + layout.block);
      const float scale = layout.read_scale(row, b);
      if (is_fp8(layout.body_format)) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) out[i] = from_e4m3(row[i]) * scale;
      } else {
#pragma omp simd
        for (int64_t i = begin / 2; i < end / 2; ++i) {
          out[2 * i] = from_e2m1(row[i] & 15) * scale;
          out[2 * i + 1] = from_e2m1(row[i] >> 4) * scale;
        }
      }
    }
  }
  if (layout.rope) unpack_plain(row + layout.body_bytes, layout.rope, layout.rope_format, out + layout.body);
}

inline void pack_plain(const float* x, int64_t n, int64_t format, uint8_t* row) {
  if (format == kFp32) {
    std::memcpy(row, x, 4 * n);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t half = round_to_bf16(x[i]);
    std::memcpy(row + 2 * i, &half, 2);
  }
}

inline void pack_row(const float* __restrict x, const Layout& layout, uint8_t* __restrict row) {
  std::memset(row + layout.body_bytes + layout.rope_bytes, 0, layout.nbytes() - layout.body_bytes - layout.rope_bytes);
  if (layout.body_format < kFp8) {
    pack_plain(x, layout.body, layout.body_format, row);
  } else {
    for (int64_t b = 0; b < layout.scales; ++b) {
      const int64_t begin = b * layout.block, end = std::min(layout.body, begin + layout.block);
      const float amax = largest_magnitude(x + begin, end - begin);
      const float scale = layout.write_scale(row, b, scale_exponent(amax, layout.body_format));
      if (is_fp8(layout.body_format)) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) row[i] = to_e4m3(x[i] / scale);
      } else {
        for (int64_t i = begin / 2; i < end / 2; ++i) {
          const uint8_t low = to_e2m1(round_to_e2m1(x[2 * i] / scale));
          row[i] = low | static_cast<uint8_t>(to_e2m1(round_to_e2m1(x[2 * i + 1] / scale)) << 4);
        }
      }
    }
  }
  if (layout.rope) pack_plain(x + layout.body, layout.rope, layout.rope_format, row + layout.body_bytes);
}

// Rows of a sequence in pages of a shared pool: entry i is row i % page_size of page pages[i / page_size].
struct Pages {
  const uint8_t* storage;
  const int64_t* pages;
  int64_t page_size, nbytes;

  const uint8_t* row(int64_t entry) const {
    return storage + (pages[entry / page_size] * page_size + entry % page_size) * nbytes;
  }
};

// Writable rows: row `entry` of sequence b in storage uint8 [rows, nbytes], found through page_table int64 [B, P].
struct WritablePages {
  Tensor storage, table;
  Layout layout;
  int64_t page_size;
  const char* name;  // of the operator, for errors

  WritablePages(const Tensor& rows, const Tensor& page_table, int64_t per_page, at::IntArrayRef spec, int64_t sequences,
                const char* op)
      : storage(rows), table(page_table.contiguous()), layout(spec), page_size(per_page), name(op) {
    TORCH_CHECK_VALUE(storage.is_contiguous() && storage.scalar_type() == at::kByte && storage.dim() == 2 &&
                          storage.size(1) == layout.nbytes() && table.dim() == 2 && table.size(0) == sequences &&
                          table.scalar_type() == at::kLong,
                      name, ": storage ", storage.sizes(), " and page table ", table.sizes(), " do not match ", sequences,
                      " sequences");
  }

  // Entries of a sequence that the page table has room for.
  int64_t capacity() const { return table.size(1) * page_size; }

  void pack(int64_t b, int64_t entry, const float* x) const {
    const int64_t page = table.const_data_ptr<int64_t>()[b * table.size(1) + entry / page_size];
    const int64_t row = page * page_size + entry % page_size;
    TORCH_CHECK_INDEX(0 <= row && row < storage.size(0), name, ": page ", page, " does not exist");
    pack_row(x, layout, static_cast<uint8_t*>(storage.mutable_data_ptr()) + row * layout.nbytes());
  }
};

}  // namespace fiftyfold

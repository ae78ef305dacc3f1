// Symmetric products of BF16 matrices: blocks on and above the diagonal, mirrored below it.
#include "../native/common.h"

#if defined(__AVX512F__)
#include <immintrin.h>

// The library is compiled for AVX-512 without BF16. supports() in cpu.py checks that the processor has its products.
#define FIFTYFOLD_BF16 __attribute__((target("avx512bf16")))
#endif

namespace fiftyfold {
namespace {

#if defined(__AVX512F__)
// A tile of kTileRows x kTileColumns sums is held in 16 registers.
constexpr int64_t kTileRows = 8, kTileColumns = 32, kTileLanes = 16;

inline uint32_t pair_at(const uint16_t* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return pair;
}

// Transpose 16 x 16 words.
inline void transpose_words(const uint16_t* from, int64_t stride, uint32_t* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      a[i + 2 * half] = _mm512_unpacklo_epi64(b[i + half], b[i + 2 + half]);
      a[i + 2 * half + 1] = _mm512_unpackhi_epi64(b[i + half], b[i + 2 + half]);
    }
  }
  for (int i = 0; i < 4; ++i) {  // quarters of four rows each
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xDD);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xDD);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kTileColumns, a[i]);
}

// to[c][r] = from[r][c] for 8 rows and 32 columns of a matrix with `stride` columns.
inline void mirror_tile(const uint16_t* from, int64_t stride, uint16_t* to) {
  __m512i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_unpacklo_epi16(a[i], a[i + 4]);
    b[i + 4] = _mm512_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = i; j < i + 2; ++j) {
      a[j] = _mm512_unpacklo_epi16(b[j], b[j + 2]);
      a[j + 2] = _mm512_unpackhi_epi16(b[j], b[j + 2]);
    }
  }
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; ++i) {  // quarter q holds column 8 q + i
    const auto store = [&](int64_t column, __m128i v) { std::memcpy(to + column * stride, &v, sizeof(v)); };
    store(i, _mm512_extracti32x4_epi32(b[i], 0));
    store(i + 8, _mm512_extracti32x4_epi32(b[i], 1));
    store(i + 16, _mm512_extracti32x4_epi32(b[i], 2));
    store(i + 24, _mm512_extracti32x4_epi32(b[i], 3));
  }
}

// panel[k][c] = elements 2k and 2k + 1 of row c, with zeros for missing rows and elements.
void pack_panel(const uint16_t* rows, int64_t count, int64_t n, uint32_t* panel) {
  if (count < kTileColumns) std::memset(panel, 0, sizeof(uint32_t) * ((n + 1) / 2) * kTileColumns);
  const int64_t whole_rows = count / 16 * 16, whole_pairs = n / 32 * 16;
  for (int64_t c = 0; c < whole_rows; c += 16) {
    for (int64_t k = 0; k < whole_pairs; k += 16) {
      transpose_words(rows + c * n + 2 * k, n, panel + k * kTileColumns + c);
    }
  }
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t k = c < whole_rows ? whole_pairs : 0; k < n / 2; ++k) {
      panel[k * kTileColumns + c] = pair_at(rows + c * n + 2 * k);
    }
    if (n % 2) panel[n / 2 * kTileColumns + c] = rows[c * n + n - 1];
  }
}

// out[r][c] = rows[r] . panel[:, c] for R rows and kTileColumns columns.
template <int R>
[[gnu::noinline]] FIFTYFOLD_BF16 void multiply_tile(const uint16_t* rows, int64_t n, const uint32_t* panel,
                                                    float* out) {
  __m512 sums[R][2];
  for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < (n + 1) / 2; ++k) {
    const bool whole = 2 * k + 1 < n;
    const auto left = (__m512bh)_mm512_loadu_si512(panel + k * kTileColumns);
    const auto right = (__m512bh)_mm512_loadu_si512(panel + k * kTileColumns + kTileLanes);
    for (int r = 0; r < R; ++r) {
      const uint32_t pair = whole ? pair_at(rows + r * n + 2 * k) : rows[r * n + 2 * k];
      const auto both = (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(pair));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(out + r * kTileColumns, sums[r][0]);
    _mm512_storeu_ps(out + r * kTileColumns + kTileLanes, sums[r][1]);
  }
}

struct SymmetricProduct {
  const uint16_t *left, *right, *added;
  int64_t rows, n;  // of left and right
  float beta, alpha;
  uint16_t* out;

  // Compute kTileColumns columns of the result down to the diagonal, and the rows below the diagonal that mirror them.
  void compute_panel(int64_t begin, uint32_t* panel) const {
    const int64_t width = std::min(kTileColumns, rows - begin), end = begin + width;
    pack_panel(right + begin * n, width, n, panel);
    alignas(64) float sums[kTileRows * kTileColumns];
    for (int64_t i = 0; i < end; i += kTileRows) {
      const int64_t count = std::min(kTileRows, end - i);
      if (count == kTileRows) {
        multiply_tile<kTileRows>(left + i * n, n, panel, sums);
      } else {
        for (int64_t r = 0; r < count; ++r) multiply_tile<1>(left + (i + r) * n, n, panel, sums + r * kTileColumns);
      }
      for (int64_t r = 0; r < count; ++r) put(sums + r * kTileColumns, width, (i + r) * rows + begin);
      if (i < begin && width == kTileColumns) mirror_tile(out + i * rows + begin, rows, out + begin * rows + i);
    }
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t i = width == kTileColumns ? begin : 0; i < c; ++i) out[c * rows + i] = out[i * rows + c];
    }
  }

  // Store alpha sums + beta added for a row of a tile.
  void put(const float* sums, int64_t width, int64_t at) const {
    if (added) {
      for (int64_t c = 0; c < width; ++c) out[at + c] = round_to_bf16(alpha * sums[c] + beta * widen(added[at + c]));
    } else {
      for (int64_t c = 0; c < width; ++c) out[at + c] = round_to_bf16(alpha * sums[c]);
    }
  }
};
#endif

// alpha left right^T + beta added, known to be symmetric: left and right BF16 [..., r, n] -> [..., r, r].
Tensor symmetric_product(const Tensor& left, const Tensor& right, const std::optional<Tensor>& added, double beta,
                         double alpha) {
#if defined(__AVX512F__)
  TORCH_CHECK(__builtin_cpu_supports("avx512bf16"), "symmetric_product: this processor has no AVX512-BF16");
  const auto is_bf16 = [](const Tensor& x) { return x.scalar_type() == at::kBFloat16 && x.is_contiguous(); };
  TORCH_CHECK_VALUE(left.dim() >= 2 && is_bf16(left) && is_bf16(right) && left.sizes() == right.sizes(),
                    "symmetric_product: expected contiguous bfloat16 matrices of one shape, found ", left.sizes(),
                    " and ", right.sizes());
  const int64_t rows = left.size(-2), n = left.size(-1), panels = (rows + kTileColumns - 1) / kTileColumns;
  auto shape = left.sizes().vec();
  shape.back() = rows;
  TORCH_CHECK_VALUE(!added || (is_bf16(*added) && added->sizes() == shape),
                    "symmetric_product: expected contiguous bfloat16 'added' ", shape);
  Tensor out = at::empty(shape, left.options());
  if (out.numel() == 0) return out;
  const auto *l = data_of<uint16_t>(left), *r = data_of<uint16_t>(right);
  const auto* a = added ? data_of<uint16_t>(*added) : nullptr;
  auto* o = mutable_data_of<uint16_t>(out);
  // A task computes a panel from the left and one from the right, so that all take about as long.
  const int64_t matrices = out.numel() / (rows * rows), tasks = (panels + 1) / 2;
  parallel_rows(matrices * tasks, rows * n * kTileColumns / 32, [&](int64_t task) {
    const int64_t matrix = task / tasks, first = task % tasks, last = panels - 1 - first;
    const int64_t in = matrix * rows * n, square = matrix * rows * rows;
    const SymmetricProduct product{l + in, r + in, a ? a + square : nullptr, rows, n, static_cast<float>(beta),
                          static_cast<float>(alpha), o + square};
    std::vector<uint32_t> panel((n + 1) / 2 * kTileColumns);
    product.compute_panel(first * kTileColumns, panel.data());
    if (last != first) product.compute_panel(last * kTileColumns, panel.data());
  });
  return out;
#else
  TORCH_CHECK(false, "symmetric_product: needs the AVX-512 version of the native operators");
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("symmetric_product(Tensor left, Tensor right, Tensor? added, float beta, float alpha) -> Tensor");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("symmetric_product", symmetric_product); }

}  // namespace fiftyfold

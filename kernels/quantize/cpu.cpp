// Rounding to a storage format.
#include "../native/common.h"

namespace fiftyfold {
namespace {

void round_block(const float* x, int64_t n, int64_t format, float* out) {
  const float scale = e8m0_to_float(scale_exponent(largest_magnitude(x, n), format));
  if (is_fp8(format)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] != x[i] ? x[i] : from_e4m3(to_e4m3(x[i] / scale)) * scale;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = round_to_e2m1(x[i] / scale) * scale;
  }
}

void round_row(const float* x, int64_t n, int64_t format, float* out) {
  if (format == kFp32) {
    std::memcpy(out, x, 4 * n);
  } else if (format == kBf16) {
    for (int64_t i = 0; i < n; ++i) out[i] = widen(round_to_bf16(x[i]));
  } else {
    const int64_t block = std::min<int64_t>(block_of(format), n);
    for (int64_t begin = 0; begin < n; begin += block) {
      round_block(x + begin, std::min(block, n - begin), format, out + begin);
    }
  }
}

// Round x, float32 [..., n], to the formats of a layout: the first `body` dims to one, the last `rope` dims to the other.
Tensor round_to_layout(const Tensor& input, at::IntArrayRef spec) {
  const Layout layout(spec);
  const Tensor x = contiguous_float(input, "round_to_layout: x");
  TORCH_CHECK_VALUE(x.size(-1) == layout.size(), "round_to_layout: expected ", layout.size(), " dims, found ", x.size(-1));
  Tensor out = at::empty_like(x);
  const int64_t n = x.size(-1);
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  parallel_rows(rows_of(x), 4 * n, [&](int64_t r) {
    round_row(from + r * n, layout.body, layout.body_format, to + r * n);
    if (layout.rope) round_row(from + r * n + layout.body, layout.rope, layout.rope_format, to + r * n + layout.body);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) { m.def("round_to_layout(Tensor x, int[] layout) -> Tensor"); }
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("round_to_layout", round_to_layout); }

}  // namespace fiftyfold

// The state-space scan of Mamba-2, one token after another.
#include "../native/common.h"

namespace fiftyfold {
namespace {

// row = decay * row + gain * b. Returns row . c.
inline float update_row(float* __restrict row, float decay, float gain, const float* __restrict b,
                        const float* __restrict c, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float value = decay * row[i] + gain * b[i];
    row[i] = value;
    sum += value * c[i];
  }
  return sum;
}

// x float32 [batch, S, H, P], dt [batch, S, H], A and D [H], B and C [batch, S, G, N], state [batch, H, P, N] and
// positions int64 [batch, S] or none -> y [batch, S, H, P] and the state after the last token.
std::tuple<Tensor, Tensor> ssd_scan(const Tensor& inputs, const Tensor& steps, const Tensor& rates, const Tensor& into,
                                    const Tensor& out_of, const Tensor& skips, const std::optional<Tensor>& before,
                                    const std::optional<Tensor>& positions) {
  const Tensor x = contiguous_float(inputs, "ssd_scan: x"), dt = contiguous_float(steps, "ssd_scan: dt"),
               A = contiguous_float(rates, "ssd_scan: A"), B = contiguous_float(into, "ssd_scan: B"),
               C = contiguous_float(out_of, "ssd_scan: C"), D = contiguous_float(skips, "ssd_scan: D");
  TORCH_CHECK_VALUE(x.dim() == 4 && B.dim() == 4 && B.sizes() == C.sizes() && x.size(0) == B.size(0) &&
                        x.size(1) == B.size(1) && B.size(2) > 0 && x.size(2) % B.size(2) == 0 &&
                        dt.sizes() == x.sizes().slice(0, 3) && A.numel() == x.size(2) && D.numel() == x.size(2),
                    "ssd_scan: x ", x.sizes(), ", dt ", dt.sizes(), ", B ", B.sizes(), " and C ", C.sizes(),
                    " do not match");
  const int64_t batch = x.size(0), S = x.size(1), H = x.size(2), P = x.size(3), G = B.size(2), N = B.size(3);
  Tensor y = at::empty_like(x), state = at::empty({batch, H, P, N}, x.options());
  float *rows = state.mutable_data_ptr<float>(), *to = y.mutable_data_ptr<float>();
  Tensor start;
  if (before) {
    start = contiguous_float(*before, "ssd_scan: state");
    TORCH_CHECK_VALUE(start.sizes() == state.sizes(), "ssd_scan: expected a state ", state.sizes(), ", found ",
                      start.sizes());
  }
  Tensor places;
  if (positions) {
    places = positions->contiguous();
    TORCH_CHECK_VALUE(places.sizes() == at::IntArrayRef({batch, S}) && places.scalar_type() == at::kLong,
                      "ssd_scan: expected positions int64 [", batch, ", ", S, "]");
  }
  const int64_t* place = positions ? places.const_data_ptr<int64_t>() : nullptr;
  const float *px = x.const_data_ptr<float>(), *pdt = dt.const_data_ptr<float>(), *pA = A.const_data_ptr<float>(),
              *pB = B.const_data_ptr<float>(), *pC = C.const_data_ptr<float>(), *pD = D.const_data_ptr<float>(),
              *first = before ? start.const_data_ptr<float>() : nullptr;
  parallel_rows(batch * H, S * P * N, [&](int64_t i) {
    const int64_t b = i / H, h = i % H, g = h / (H / G);
    float* own = rows + i * P * N;
    if (first) {
      std::memcpy(own, first + i * P * N, 4 * P * N);
    } else {
      std::fill(own, own + P * N, 0.0f);
    }
    for (int64_t t = b * S; t < (b + 1) * S; ++t) {
      if (place && !place[t]) std::fill(own, own + P * N, 0.0f);  // a document begins
      const float step = pdt[t * H + h], decay = exp_of(step * pA[h]);
      for (int64_t p = 0; p < P; ++p) {
        const float value = px[(t * H + h) * P + p];
        const float* group = pB + (t * G + g) * N;
        to[(t * H + h) * P + p] =
            update_row(own + p * N, decay, step * value, group, pC + (t * G + g) * N, N) + pD[h] * value;
      }
    }
  });
  return {y, state};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def(
      "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? state, Tensor? positions) -> "
      "(Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("ssd_scan", ssd_scan); }

}  // namespace fiftyfold

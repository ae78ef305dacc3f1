// RMS normalization, forward and backward.
#include <ATen/ops/zeros.h>

#include "../native/rows.h"

namespace fiftyfold {
namespace {

constexpr int64_t kRowsPerSum = 64;  // rows whose weight gradients are summed together, for any number of threads

// x float32 or BF16 [..., n], weight float32 [n], optional -> float32 [..., n].
Tensor rms_norm(const Tensor& input, const std::optional<Tensor>& weight, double eps) {
  const Tensor x = contiguous_float_or_bf16(input, "rms_norm: x");
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  const int64_t n = x.size(-1);
  const float* gains = weight ? weight->const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  by_type(x, [&]<typename T>() {
    const T* from = data_of<T>(x);
    parallel_rows(rows_of(x), 2 * n, [&](int64_t r) {
      normalize_row(from + r * n, n, gains, static_cast<float>(eps), to + r * n);
    });
  });
  return out;
}

// Gradient of one row of x. Adds the row's part of the weight's gradient to `grad_gains`.
template <bool kWeighted, typename T>
void normalize_row_backward(const float* grad, const T* row, int64_t n, const float* gains, float eps, T* grad_row,
                            float* grad_gains) {
  auto scaled = [&](int64_t i) { return kWeighted ? grad[i] * gains[i] : grad[i]; };
  float squares = 0, along = 0;
#pragma omp simd reduction(+ : squares, along)
  for (int64_t i = 0; i < n; ++i) {
    const float x = widen(row[i]);
    squares += x * x;
    along += scaled(i) * x;
  }
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  const float shrink = along * scale * scale / static_cast<float>(n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float x = widen(row[i]);
    grad_row[i] = narrowed<T>(scale * (scaled(i) - shrink * x));
    if constexpr (kWeighted) grad_gains[i] += grad[i] * x * scale;
  }
}

// grad float32 [..., n] -> gradients of x, in its dtype, and of the weight, float32 [n] ([0] without a weight).
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grads, const Tensor& input, const std::optional<Tensor>& weight,
                                             double eps) {
  const Tensor x = contiguous_float_or_bf16(input, "rms_norm: x"), grad = contiguous_float(grads, "rms_norm: gradient");
  const int64_t n = x.size(-1), rows = rows_of(x), groups = (rows + kRowsPerSum - 1) / kRowsPerSum;
  Tensor grad_x = at::empty_like(x), partial = at::zeros({groups, weight ? n : 0}, grad.options());
  const float *from = grad.const_data_ptr<float>(), *gains = weight ? weight->const_data_ptr<float>() : nullptr;
  float* sums = partial.mutable_data_ptr<float>();
  by_type(x, [&]<typename T>() {
    const T* given = data_of<T>(x);
    T* to = mutable_data_of<T>(grad_x);
    auto run = gains ? normalize_row_backward<true, T> : normalize_row_backward<false, T>;
    parallel_rows(groups, 4 * n * kRowsPerSum, [&](int64_t group) {
      for (int64_t r = group * kRowsPerSum; r < std::min(rows, (group + 1) * kRowsPerSum); ++r) {
        run(from + r * n, given + r * n, n, gains, static_cast<float>(eps), to + r * n, sums + group * n);
      }
    });
  });
  return {grad_x, partial.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
}

}  // namespace fiftyfold

// SwiGLU in a single pass, forward and backward.
#include "../native/common.h"

namespace fiftyfold {
namespace {

// Checked inputs: gate and up, both float32 or both BF16, [..., n], and gain, float32 [..., 1], optional.
struct GatedInputs {
  Tensor gate, up, gain;
  int64_t rows, n;

  GatedInputs(const Tensor& gates, const Tensor& ups, const std::optional<Tensor>& gains)
      : gate(contiguous_float_or_bf16(gates, "swiglu: gate")), up(contiguous_float_or_bf16(ups, "swiglu: up")),
        rows(rows_of(gate)), n(gate.size(-1)) {
    if (gains) gain = contiguous_float(*gains, "swiglu: gain");
    TORCH_CHECK_VALUE(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(), "swiglu: gate ",
                      gate.scalar_type(), " ", gate.sizes(), " and up ", up.scalar_type(), " ", up.sizes(),
                      " do not match");
    TORCH_CHECK_VALUE(!gains || gain.numel() == rows, "swiglu: gate ", gate.sizes(), " and gain ", gain.sizes(),
                      " do not match");
  }

  const float* gains() const { return gain.defined() ? gain.const_data_ptr<float>() : nullptr; }
};

// Return gain * silu(gate) * up, [..., n] in the dtype of gate.
Tensor swiglu(const Tensor& gates, const Tensor& ups, double limit, const std::optional<Tensor>& scale) {
  const GatedInputs in(gates, ups, scale);
  Tensor out = at::empty_like(in.gate);
  const float *gains = in.gains(), most = static_cast<float>(limit);
  by_type(out, [&]<typename T>() {
    parallel_rows(in.rows, 8 * in.n, [&, g = data_of<T>(in.gate), u = data_of<T>(in.up),
                                      y = mutable_data_of<T>(out)](int64_t r) {
      const float gain = gains ? gains[r] : 1.0f;
#pragma omp simd
      for (int64_t i = r * in.n; i < (r + 1) * in.n; ++i) {
        y[i] = narrowed<T>(gain * swiglu_of(widen(g[i]), widen(u[i]), most));
      }
    });
  });
  return out;
}

// Write the gradients of gate and up for one row. Return the gradient of the gain.
template <typename T>
float swiglu_row_backward(const T* grad, const T* gate, const T* up, int64_t n, float gain, float limit, T* grad_gate,
                          T* grad_up) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float given_gate = widen(gate[i]), given_up = widen(up[i]), upstream = widen(grad[i]), g = upstream * gain;
    const bool over = given_gate > limit, outside = std::fabs(given_up) > limit;
    const float x = over ? limit : given_gate, u = outside ? std::copysign(limit, given_up) : given_up;
    const float s = sigmoid(x), silu = x * s;
    sum += upstream * silu * u;
    grad_gate[i] = narrowed<T>(over ? 0.0f : g * u * (s + silu * (1.0f - s)));
    grad_up[i] = narrowed<T>(outside ? 0.0f : g * silu);
  }
  return sum;
}

// From grad, in the dtype of gate, return the gradients of gate and up, and of the gain, float32 [rows] ([0] without a gain).
std::tuple<Tensor, Tensor, Tensor> swiglu_backward(const Tensor& grads, const Tensor& gates, const Tensor& ups,
                                                   double limit, const std::optional<Tensor>& scale) {
  const GatedInputs in(gates, ups, scale);
  const Tensor grad = grads.contiguous();
  TORCH_CHECK_VALUE(grad.scalar_type() == in.gate.scalar_type() && grad.sizes() == in.gate.sizes(),
                    "swiglu: gradient and gate do not match");
  Tensor grad_gate = at::empty_like(in.gate), grad_up = at::empty_like(in.gate);
  Tensor grad_gain = at::empty({scale ? in.rows : 0}, in.gate.options().dtype(at::kFloat));
  const float *gains = in.gains(), most = static_cast<float>(limit);
  float* sums = grad_gain.mutable_data_ptr<float>();
  by_type(grad, [&]<typename T>() {
    const T *from = data_of<T>(grad), *g = data_of<T>(in.gate), *u = data_of<T>(in.up);
    T *to_gate = mutable_data_of<T>(grad_gate), *to_up = mutable_data_of<T>(grad_up);
    parallel_rows(in.rows, 16 * in.n, [&](int64_t r) {
      const int64_t at = r * in.n;
      const float sum = swiglu_row_backward(from + at, g + at, u + at, in.n, gains ? gains[r] : 1.0f, most, to_gate + at,
                                            to_up + at);
      if (gains) sums[r] = sum;
    });
  });
  return {grad_gate, grad_up, grad_gain};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("swiglu(Tensor gate, Tensor up, float limit, Tensor? gain) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up, float limit, Tensor? gain) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
}

}  // namespace fiftyfold

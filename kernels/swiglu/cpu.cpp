// SwiGLU in a single pass.
#include "../native/common.h"

namespace fiftyfold {
namespace {

// gate and up float32 [..., n] -> float32 [..., n].
Tensor swiglu(const Tensor& gates, const Tensor& ups, double limit) {
  const Tensor gate = contiguous_float(gates, "swiglu: gate"), up = contiguous_float(ups, "swiglu: up");
  TORCH_CHECK_VALUE(gate.sizes() == up.sizes(), "swiglu: gate ", gate.sizes(), " and up ", up.sizes(), " do not match");
  Tensor out = at::empty_like(gate);
  const float *g = gate.const_data_ptr<float>(), *u = up.const_data_ptr<float>();
  float* y = out.mutable_data_ptr<float>();
  const float most = static_cast<float>(limit);
  constexpr int64_t kPiece = 1024;
  const int64_t n = gate.numel();
  parallel_rows((n + kPiece - 1) / kPiece, 8 * kPiece, [&](int64_t piece) {
    const int64_t end = std::min(n, (piece + 1) * kPiece);
#pragma omp simd
    for (int64_t i = piece * kPiece; i < end; ++i) y[i] = swiglu_of(g[i], u[i], most);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) { m.def("swiglu(Tensor gate, Tensor up, float limit) -> Tensor"); }
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("swiglu", swiglu); }

}  // namespace fiftyfold

// RMS normalization.
#include "../native/rows.h"

namespace fiftyfold {
namespace {

// x float32 [..., n], weight float32 [n], optional -> float32 [..., n].
Tensor rms_norm(const Tensor& input, const std::optional<Tensor>& weight, double eps) {
  const Tensor x = contiguous_float(input, "rms_norm: x");
  Tensor out = at::empty_like(x);
  const int64_t n = x.size(-1);
  const float* gains = weight ? weight->const_data_ptr<float>() : nullptr;
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  parallel_rows(rows_of(x), 2 * n, [&](int64_t r) {
    normalize_row(from + r * n, n, gains, static_cast<float>(eps), to + r * n);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) { m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor"); }
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("rms_norm", rms_norm); }

}  // namespace fiftyfold

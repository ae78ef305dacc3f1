// Rotary position embedding: rotation of pairs, and cosines and sines of the angles.
#include "../native/rows.h"

namespace fiftyfold {
namespace {

// Rotate the pairs of the last 2r dims of x, float32 or BF16 [B, S, ..., n], and copy the others: float32. cos and sin
// are float32 [B or 1, S, r]. `inverse` negates the angles.
Tensor rotate(const Tensor& input, const Tensor& cosines, const Tensor& sines, bool inverse) {
  const Tensor x = contiguous_float_or_bf16(input, "rotate: x");
  TORCH_CHECK_VALUE(x.dim() >= 3 && 2 * cosines.size(2) <= x.size(-1), "rotate: x ", x.sizes(), " and cos ",
                    cosines.sizes(), " do not match");
  const Tensor cos = cosines.contiguous(), sin = sines.contiguous();
  const int64_t n = x.size(-1), B = x.size(0), S = x.size(1), each = B * S ? x.numel() / (B * S * n) : 0;
  const Angles angles(cos, sin, B, S);
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  by_type(x, [&]<typename T>() {
    const T* from = data_of<T>(x);
    parallel_rows(B * S, each * n, [&](int64_t token) {
      for (int64_t h = token * each; h < (token + 1) * each; ++h) {
        angles.rotate(token, from + h * n, n, inverse, to + h * n);
      }
    });
  });
  return out;
}

// Cosines and sines, float32 [B, S, r], of positions int64 [B, S] times frequencies float64 [r].
std::tuple<Tensor, Tensor> angles(const Tensor& positions, const Tensor& frequencies) {
  const Tensor p = positions.contiguous(), f = frequencies.contiguous();
  const int64_t r = f.numel();
  auto shape = p.sizes().vec();
  shape.push_back(r);
  const auto options = f.options().dtype(at::kFloat);
  Tensor cos = at::empty(shape, options), sin = at::empty(shape, options);
  const auto* at_token = p.const_data_ptr<int64_t>();
  const auto* speed = f.const_data_ptr<double>();
  float *c = cos.mutable_data_ptr<float>(), *s = sin.mutable_data_ptr<float>();
  parallel_rows(p.numel(), 32 * r, [&](int64_t t) {
    for (int64_t i = 0; i < r; ++i) {
      const double angle = static_cast<double>(at_token[t]) * speed[i];
      c[t * r + i] = static_cast<float>(std::cos(angle));
      s[t * r + i] = static_cast<float>(std::sin(angle));
    }
  });
  return {cos, sin};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");
  m.def("angles(Tensor positions, Tensor frequencies) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("rotate", rotate);
  m.impl("angles", angles);
}

}  // namespace fiftyfold

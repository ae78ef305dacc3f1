// Products of few tokens with large matrices, float32 or BF16. Time is bound by reading the weights.
#include "../native/rows.h"

namespace fiftyfold {
namespace {

void check_weight(const Tensor& x, const Tensor& weight, int64_t dim, int64_t in) {
  const bool is_dense = dim == 2 ? weight.is_contiguous() : weight.dim() == 3 && weight[0].is_contiguous();
  TORCH_CHECK_VALUE(is_dense && weight.dim() == dim && x.size(-1) == in, "linear: x ", x.sizes(),
                    " and weight ", weight.sizes(), " do not match");
}

// x [..., in] and weights [out_i, in] -> [..., sum of out_i].
Tensor linear(const Tensor& input, at::TensorList weights) {
  const Tensor x = contiguous_float(input, "linear: x");
  int64_t width = 0;
  for (const Tensor& weight : weights) {
    check_weight(x, weight, 2, weight.size(-1));
    width += weight.size(0);
  }
  auto shape = x.sizes().vec();
  shape.back() = width;
  Tensor y = at::empty(shape, x.options());
  auto* from = const_cast<float*>(x.const_data_ptr<float>());
  auto* to = y.mutable_data_ptr<float>();
  for (const Tensor& weight : weights) {
    multiply({from, rows_of(x), x.size(-1)}, weight, 0, {to, rows_of(x), width});
    to += weight.size(0);
  }
  return y;
}

// x [..., g * in] and weight [g, out, in] -> [..., g * out]. The matrices of groups may lie apart.
Tensor grouped_linear(const Tensor& input, const Tensor& weight) {
  const Tensor x = contiguous_float(input, "linear: x");
  check_weight(x, weight, 3, weight.size(0) * weight.size(-1));
  const int64_t groups = weight.size(0), out = weight.size(1), in = weight.size(2);
  auto shape = x.sizes().vec();
  shape.back() = groups * out;
  Tensor y = at::empty(shape, x.options());
  auto* from = const_cast<float*>(x.const_data_ptr<float>());
  auto* to = y.mutable_data_ptr<float>();
  for (int64_t g = 0; g < groups; ++g) {
    multiply({from + g * in, rows_of(x), groups * in}, weight, g, {to + g * out, rows_of(x), groups * out});
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("linear(Tensor x, Tensor[] weights) -> Tensor");
  m.def("grouped_linear(Tensor x, Tensor weight) -> Tensor");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("linear", linear);
  m.impl("grouped_linear", grouped_linear);
}

}  // namespace fiftyfold

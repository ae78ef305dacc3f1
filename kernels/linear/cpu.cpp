// Products of a few tokens with large matrices: all time goes into reading the weights, float32 or BF16.
#include "../native/common.h"

namespace fiftyfold {
namespace {

struct Rows {
  float* data;
  int64_t count, stride;
};

// to[t, o] = from[t] . w[o]; a row of weights is read once for all tokens.
template <typename W>
void multiply(Rows from, const W* w, int64_t in, int64_t out, Rows to) {
  parallel_rows(out, in * from.count, [&](int64_t o) {
    for (int64_t t = 0; t < from.count; ++t) {
      to.data[t * to.stride + o] = streamed_dot(from.data + t * from.stride, w + o * in, in);
    }
  });
}

void multiply(Rows from, const Tensor& weight, int64_t group, Rows to) {
  const int64_t out = weight.size(-2), in = weight.size(-1), begin = group * out * in;
  if (weight.scalar_type() == at::kFloat) {
    multiply(from, weight.const_data_ptr<float>() + begin, in, out, to);
  } else {
    const auto* w = reinterpret_cast<const uint16_t*>(weight.const_data_ptr<BFloat16>());
    multiply(from, w + begin, in, out, to);
  }
}

void check_weight(const Tensor& x, const Tensor& weight, int64_t dim, int64_t in) {
  TORCH_CHECK_VALUE(weight.is_contiguous() && weight.dim() == dim && x.size(-1) == in, "linear: x ", x.sizes(),
                    " and weight ", weight.sizes(), " do not fit");
}

// x [..., in] and weights [out, in] -> [..., sum of outs].
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

// x [..., g * in] and weight [g, out, in] -> [..., g * out].
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

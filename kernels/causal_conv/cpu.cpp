// Short causal convolutions followed by SiLU.
#include "../native/common.h"

namespace fiftyfold {
namespace {

constexpr int64_t kChannels = 64;  // channels computed together

// Inputs of the forward and the backward pass: x float32 [B, S, C] with contiguous channels, weight float32 [C, K],
// bias float32 [C], tail float32 [B, K - 1, C] and positions int64 [B, S], the last three optional.
struct ConvInputs {
  Tensor x, tail_rows, columns;  // columns [K, C]: the transposed weight
  std::optional<Tensor> bias, positions;
  int64_t B, S, C, K;

  ConvInputs(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& biases,
             const std::optional<Tensor>& tail, const std::optional<Tensor>& places)
      : B(input.size(0)), S(input.size(1)), C(input.size(2)), K(weight.size(1)) {
    TORCH_CHECK_VALUE(input.dim() == 3 && input.scalar_type() == at::kFloat && weight.dim() == 2 &&
                          weight.size(0) == C && K >= 2 && (!biases || biases->numel() == C),
                      "causal_conv: x ", input.scalar_type(), " ", input.sizes(), " and weight ", weight.sizes(),
                      " do not match");
    TORCH_CHECK_VALUE(!tail || (tail->size(0) == B && tail->size(1) == K - 1 && tail->size(2) == C),
                      "causal_conv: tail does not match x ", input.sizes(), " and weight ", weight.sizes());
    TORCH_CHECK_VALUE(!places || (places->sizes() == at::IntArrayRef({B, S}) && places->scalar_type() == at::kLong),
                      "causal_conv: expected positions int64 [", B, ", ", S, "]");
    x = input.stride(2) == 1 ? input : input.contiguous();
    columns = contiguous_float(weight, "causal_conv: weight").t().contiguous();
    if (biases) bias = contiguous_float(*biases, "causal_conv: bias");
    if (tail) tail_rows = contiguous_float(*tail, "causal_conv: tail");
    if (places) positions = places->contiguous();
  }

  // Return the number of earlier tokens that token t of sequence b sees, at most K - 1.
  int64_t reach(int64_t b, int64_t t) const {
    const int64_t stored = tail_rows.defined() ? K - 1 : std::min(t, K - 1);
    return positions ? std::min(stored, positions->const_data_ptr<int64_t>()[b * S + t]) : stored;
  }

  // Return the channels [C] of the token `distance` tokens before token t.
  const float* row(int64_t b, int64_t t, int64_t distance) const {
    const int64_t place = t - distance;
    return place >= 0 ? x.const_data_ptr<float>() + b * x.stride(0) + place * x.stride(1)
                      : tail_rows.const_data_ptr<float>() + (b * (K - 1) + K - 1 + place) * C;
  }

  // Write the convolution of the channels [c, c + n) at token t, before SiLU.
  void sum(int64_t b, int64_t t, int64_t c, int64_t n, float* __restrict out) const {
    if (bias) {
      std::memcpy(out, bias->const_data_ptr<float>() + c, 4 * n);
    } else {
      std::fill(out, out + n, 0.0f);
    }
    for (int64_t distance = reach(b, t); distance >= 0; --distance) {
      const float* __restrict w = columns.const_data_ptr<float>() + (K - 1 - distance) * C + c;
      const float* __restrict from = row(b, t, distance) + c;
      for (int64_t i = 0; i < n; ++i) out[i] += w[i] * from[i];
    }
  }

  // Run f(sequence, first channel, channels) for blocks of channels of every sequence.
  template <typename F>
  void each_block(F f) const {
    const int64_t blocks = (C + kChannels - 1) / kChannels;
    parallel_rows(B * blocks, S * K * kChannels, [&](int64_t i) {
      const int64_t c = i % blocks * kChannels;
      f(i / blocks, c, std::min(kChannels, C - c));
    });
  }
};

// Convolve and apply SiLU. Return float32 [B, S, C].
Tensor causal_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& tail, const std::optional<Tensor>& positions) {
  const ConvInputs in(x, weight, bias, tail, positions);
  Tensor out = at::empty({in.B, in.S, in.C}, x.options());
  float* to = out.mutable_data_ptr<float>();
  in.each_block([&](int64_t b, int64_t c, int64_t n) {
    for (int64_t t = 0; t < in.S; ++t) {
      float* row = to + (b * in.S + t) * in.C + c;
      in.sum(b, t, c, n, row);
      for (int64_t i = 0; i < n; ++i) row[i] *= sigmoid(row[i]);
    }
  });
  return out;
}

// From grad, float32 [B, S, C], return the gradients of x [B, S, C], of the tail [B, K - 1, C], and for every sequence those
// of the transposed weight and of the bias [B, K + 1, C].
std::tuple<Tensor, Tensor, Tensor> causal_conv_backward(const Tensor& grads, const Tensor& x, const Tensor& weight,
                                                        const std::optional<Tensor>& bias,
                                                        const std::optional<Tensor>& tail,
                                                        const std::optional<Tensor>& positions) {
  const ConvInputs in(x, weight, bias, tail, positions);
  const Tensor grad = contiguous_float(grads, "causal_conv: gradient");
  const int64_t S = in.S, C = in.C, K = in.K;
  Tensor grad_x = at::empty({in.B, S, C}, grad.options()), grad_tail = at::empty({in.B, K - 1, C}, grad.options()),
         sums = at::empty({in.B, K + 1, C}, grad.options());
  const float *from = grad.const_data_ptr<float>(), *columns = in.columns.const_data_ptr<float>();
  float *to_x = grad_x.mutable_data_ptr<float>(), *to_tail = grad_tail.mutable_data_ptr<float>(),
        *to_sums = sums.mutable_data_ptr<float>();
  in.each_block([&](int64_t b, int64_t c, int64_t n) {
    float inner[kChannels];
    auto target = [&](int64_t place) {
      return (place >= 0 ? to_x + (b * S + place) * C : to_tail + (b * (K - 1) + K - 1 + place) * C) + c;
    };
    for (int64_t place = 1 - K; place < S; ++place) std::fill(target(place), target(place) + n, 0.0f);
    auto total = [&](int64_t k) { return to_sums + (b * (K + 1) + k) * C + c; };
    for (int64_t k = 0; k <= K; ++k) std::fill(total(k), total(k) + n, 0.0f);
    for (int64_t t = 0; t < S; ++t) {
      in.sum(b, t, c, n, inner);
      const float* g = from + (b * S + t) * C + c;
      for (int64_t i = 0; i < n; ++i) {
        const float s = sigmoid(inner[i]);
        inner[i] = g[i] * s * (1.0f + inner[i] * (1.0f - s));
      }
      float* of_bias = total(K);
      for (int64_t i = 0; i < n; ++i) of_bias[i] += inner[i];
      for (int64_t distance = in.reach(b, t); distance >= 0; --distance) {
        const int64_t k = K - 1 - distance;
        const float *__restrict w = columns + k * C + c, *__restrict row = in.row(b, t, distance) + c;
        float *__restrict of_x = target(t - distance), *__restrict of_w = total(k);
        for (int64_t i = 0; i < n; ++i) {
          of_x[i] += inner[i] * w[i];
          of_w[i] += inner[i] * row[i];
        }
      }
    }
  });
  return {grad_x, grad_tail, sums};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("causal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? tail, Tensor? positions) -> Tensor");
  m.def(
      "causal_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? tail, Tensor? positions) -> "
      "(Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("causal_conv", causal_conv);
  m.impl("causal_conv_backward", causal_conv_backward);
}

}  // namespace fiftyfold

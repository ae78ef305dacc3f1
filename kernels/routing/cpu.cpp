// Routing of tokens to experts.
#include "../native/common.h"

namespace fiftyfold {
namespace {

// logits float32 [N, E]; bias float32 [E], for the choice alone; `fixed` int64 [N, K], experts chosen in advance. Returns
// the chosen experts, int64 [N, K], and their weights, float32 [N, K]: sqrt(softplus(logit)), normalized and scaled.
std::tuple<Tensor, Tensor> route(const Tensor& given, const Tensor& bias, const std::optional<Tensor>& fixed, int64_t k,
                                 double scale) {
  const Tensor logits = contiguous_float(given, "route: logits");
  const int64_t N = rows_of(logits), E = logits.size(-1);
  TORCH_CHECK_VALUE(k >= 1 && k <= E, "route: cannot choose ", k, " of ", E, " experts");
  auto shape = logits.sizes().vec();
  shape.back() = k;
  Tensor weights = at::empty(shape, logits.options());
  Tensor chosen = fixed ? fixed->clone(at::MemoryFormat::Contiguous) : at::empty(shape, logits.options().dtype(at::kLong));
  TORCH_CHECK_VALUE(chosen.numel() == N * k, "route: chosen ", chosen.sizes(), " does not match logits ", logits.sizes());
  TORCH_CHECK_VALUE(bias.numel() == E && bias.is_contiguous(), "route: bias ", bias.sizes(), " does not match logits ",
                    logits.sizes());
  for (int64_t i = 0; fixed && i < chosen.numel(); ++i) {
    const int64_t id = chosen.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(id >= 0 && id < E, "route: expert ", id, " of ", E);
  }
  const float *z = logits.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
  auto* picks = chosen.mutable_data_ptr<int64_t>();
  float* gains = weights.mutable_data_ptr<float>();
  at::parallel_for(0, N, std::max<int64_t>(1, kGrain / (32 * E)), [&](int64_t begin, int64_t end) {
    std::vector<float> affinity(E), keys(E);
    std::vector<int64_t> order(E);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t e = 0; e < E; ++e) {
        const float x = z[t * E + e];
        affinity[e] = std::sqrt(x > 20.0f ? x : std::log1p(std::exp(x)));  // softplus as in PyTorch
      }
      if (!fixed) {
        for (int64_t e = 0; e < E; ++e) {
          const float key = affinity[e] + b[e];
          order[e] = e, keys[e] = key == key ? key : -INFINITY;  // NaN cannot be ordered
        }
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t i, int64_t j) {
          return keys[i] != keys[j] ? keys[i] > keys[j] : i < j;
        });
        std::copy(order.begin(), order.begin() + k, picks + t * k);
      }
      float sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += affinity[picks[t * k + i]];
      for (int64_t i = 0; i < k; ++i) {
        gains[t * k + i] = affinity[picks[t * k + i]] / sum * static_cast<float>(scale);
      }
    }
  });
  return {chosen, weights};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("route(Tensor logits, Tensor bias, Tensor? chosen, int k, float scale) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("route", route); }

}  // namespace fiftyfold

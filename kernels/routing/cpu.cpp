// Routing of tokens to experts.
#include <numeric>

#include "../native/common.h"

namespace fiftyfold {
namespace {

constexpr float kLeastSum = 1e-20f;  // added to the sum of affinities, which can be zero

float affinity_of(float x, bool sigmoid) {
  if (sigmoid) return 1.0f / (1.0f + std::exp(-x));
  return std::sqrt(x > 20.0f ? x : std::log1p(std::exp(x)));  // softplus as in PyTorch
}

// Orders indices by falling key, equal keys by index.
auto by_falling(const float* keys) {
  return [keys](int64_t i, int64_t j) { return keys[i] != keys[j] ? keys[i] > keys[j] : i < j; };
}

// Replaces the keys [E] outside the `best` groups by -inf. A group's score is the sum of its two best keys.
void keep_best_groups(float* keys, int64_t E, int64_t groups, int64_t best, float* scores, int64_t* order) {
  const int64_t size = E / groups;
  for (int64_t g = 0; g < groups; ++g) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      if (keys[e] > first) second = first, first = keys[e];
      else second = std::max(second, keys[e]);
    }
    scores[g] = first + second, order[g] = g;
  }
  std::partial_sort(order, order + best, order + groups, by_falling(scores));
  for (int64_t i = best; i < groups; ++i) std::fill_n(keys + order[i] * size, size, -INFINITY);
}

// logits float32 [N, E]; bias float32 [E], for the choice alone; `fixed` int64 [N, K], experts chosen in advance. Returns
// the chosen experts, int64 [N, K], and their weights, float32 [N, K]: affinities, normalized and scaled.
std::tuple<Tensor, Tensor> route(const Tensor& given, const Tensor& bias, const std::optional<Tensor>& fixed, int64_t k,
                                 double scale, bool sigmoid, int64_t groups, int64_t groups_per_token) {
  const Tensor logits = contiguous_float(given, "route: logits");
  const int64_t N = rows_of(logits), E = logits.size(-1);
  TORCH_CHECK_VALUE(k >= 1 && k <= E, "route: cannot choose ", k, " of ", E, " experts");
  auto shape = logits.sizes().vec();
  shape.back() = k;
  const bool limited = groups_per_token < groups;
  TORCH_CHECK_VALUE(groups >= 1 && E % groups == 0 && groups_per_token >= 1 && groups_per_token <= groups,
                    "route: cannot choose ", groups_per_token, " of ", groups, " groups of ", E, " experts");
  TORCH_CHECK_VALUE(!limited || (E / groups >= 2 && k <= groups_per_token * (E / groups)), "route: cannot choose ", k,
                    " experts of ", groups_per_token, " groups of ", E / groups);
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
  parallel_ranges(N, 32 * E, [&](int64_t begin, int64_t end) {
    std::vector<float> affinity(E), keys(E), scores(groups);
    std::vector<int64_t> order(E);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t e = 0; e < E; ++e) affinity[e] = affinity_of(z[t * E + e], sigmoid);
      if (!fixed) {
        for (int64_t e = 0; e < E; ++e) {
          const float key = affinity[e] + b[e];
          keys[e] = key == key ? key : -INFINITY;  // NaN cannot be ordered
        }
        if (limited) keep_best_groups(keys.data(), E, groups, groups_per_token, scores.data(), order.data());
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + k, order.end(), by_falling(keys.data()));
        std::copy(order.begin(), order.begin() + k, picks + t * k);
      }
      float sum = kLeastSum;
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
  m.def("route(Tensor logits, Tensor bias, Tensor? chosen, int k, float scale, bool sigmoid, int groups, "
        "int groups_per_token) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("route", route); }

}  // namespace fiftyfold

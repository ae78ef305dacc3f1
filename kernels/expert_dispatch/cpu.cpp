// Routing of tokens, and the experts of a few tokens: all time goes into reading the weights of those chosen.
#include "../native/common.h"
#include "../native/fp4.h"

namespace fiftyfold {
namespace {

// logits float32 [N, E]; bias float32 [E] takes part in the choice only; chosen int64 [N, K] where a table decides.
// Returns chosen int64 [N, K] and weights float32 [N, K]: sqrt(softplus(logit)), normalized and scaled.
std::tuple<Tensor, Tensor> route(const Tensor& given, const Tensor& bias, const std::optional<Tensor>& fixed, int64_t k,
                                 double scale) {
  const Tensor logits = contiguous_float(given, "route: logits");
  const int64_t N = rows_of(logits), E = logits.size(-1);
  TORCH_CHECK_VALUE(k >= 1 && k <= E, "route: cannot choose ", k, " of ", E, " experts");
  auto shape = logits.sizes().vec();
  shape.back() = k;
  Tensor weights = at::empty(shape, logits.options());
  Tensor chosen = fixed ? fixed->clone(at::MemoryFormat::Contiguous) : at::empty(shape, logits.options().dtype(at::kLong));
  TORCH_CHECK_VALUE(chosen.numel() == N * k, "route: chosen ", chosen.sizes(), " does not fit logits ", logits.sizes());
  TORCH_CHECK_VALUE(bias.numel() == E && bias.is_contiguous(), "route: bias ", bias.sizes(), " does not fit");
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
        affinity[e] = std::sqrt(x > 20.0f ? x : std::log1p(std::exp(x)));  // softplus as PyTorch's
      }
      if (!fixed) {
        for (int64_t e = 0; e < E; ++e) {
          const float key = affinity[e] + b[e];
          order[e] = e, keys[e] = key == key ? key : -INFINITY;  // NaN has no place in an order
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

struct Pick {
  int64_t expert, token;
  float gain;
};

// Matrices of float32 or BF16 numbers, and of packed FP4 rows: products with a row, and vectors as they take them.
template <typename W>
struct PlainMatrices {
  const W* data;
  int64_t columns;

  static const float* arranged(const float* x, int64_t, int64_t, std::vector<float>&) { return x; }
  float dot(const float* x, int64_t row) const { return streamed_dot(x, data + row * columns, columns); }
};

struct PackedMatrices {
  const uint8_t* data;
  int64_t columns, row_bytes;

  static const float* arranged(const float* x, int64_t rows, int64_t columns, std::vector<float>& out) {
    out.resize(rows * columns);
    for (int64_t r = 0; r < rows; ++r) separate_even_odd(x + r * columns, columns, out.data() + r * columns);
    return out.data();
  }
  float dot(const float* x, int64_t row) const { return packed_dot(x, data + row * row_bytes, columns); }
};

// Add the weighted outputs of the picked experts to `out`, [tokens, d].
template <typename M>
void run_experts(const float* x, int64_t tokens, const std::vector<Pick>& picks, M w1, M w3, M w2, float limit, float* out) {
  const int64_t count = static_cast<int64_t>(picks.size()), inner = w2.columns, d = w1.columns;
  std::vector<float> middle(count * inner), arranged_x, arranged_middle;
  const float* inputs = M::arranged(x, tokens, d, arranged_x);
  // Picks are in the order of experts, so that tokens that share one read its weights from the cache.
  parallel_rows(count * inner, 2 * d, [&](int64_t i) {
    const Pick& pick = picks[i / inner];
    const int64_t row = pick.expert * inner + i % inner;
    const float* input = inputs + pick.token * d;
    middle[i] = pick.gain * swiglu_of(w1.dot(input, row), w3.dot(input, row), limit);
  });
  const float* hidden = M::arranged(middle.data(), count, inner, arranged_middle);
  parallel_rows(d, inner * count, [&](int64_t row) {
    for (int64_t p = 0; p < count; ++p) {
      out[picks[p].token * d + row] += w2.dot(hidden + p * inner, picks[p].expert * d + row);
    }
  });
}

// Experts' w1 and w3 [inner, d] and w2 [d, inner], alone or in stacks: float32, BF16, or FP4 rows packed as in the cache
// (uint8, the last dim counts bytes).
struct Stack {
  const Tensor &w1, &w3, &w2;

  bool packed() const { return w1.scalar_type() == at::kByte; }
  static int64_t packed_bytes(int64_t n) { return Layout({n, kFp4, 0, kBf16}).nbytes(); }

  void check(const Tensor& x) const {
    const int64_t d = x.size(-1), inner = w1.size(-2);
    const bool packs = !packed() || (d % kFp4Block == 0 && inner % kFp4Block == 0);
    TORCH_CHECK_VALUE(packs && w1.size(-1) == (packed() ? packed_bytes(d) : d) && w1.sizes() == w3.sizes() &&
                          w2.dim() == w1.dim() && w2.size(-2) == d && w2.size(-1) == (packed() ? packed_bytes(inner) : inner) &&
                          w1.is_contiguous() && w3.is_contiguous() && w2.is_contiguous() &&
                          (w1.dim() == 2 || w2.size(0) == w1.size(0)) && w1.scalar_type() == w2.scalar_type() &&
                          w1.scalar_type() == w3.scalar_type(),
                      "experts: x ", x.sizes(), " and w1 ", w1.sizes(), " do not fit");
  }

  void add(const Tensor& x, const std::vector<Pick>& picks, float limit, float* out) const {
    const int64_t inner = w1.size(-2), d = x.size(-1);
    auto run = [&](auto matrices) {
      run_experts(x.const_data_ptr<float>(), rows_of(x), picks, matrices(w1, d), matrices(w3, d), matrices(w2, inner), limit, out);
    };
    if (packed()) {
      run([](const Tensor& w, int64_t n) { return PackedMatrices{w.const_data_ptr<uint8_t>(), n, w.size(-1)}; });
    } else if (w1.scalar_type() == at::kFloat) {
      run([](const Tensor& w, int64_t n) { return PlainMatrices<float>{w.const_data_ptr<float>(), n}; });
    } else {
      run([](const Tensor& w, int64_t n) {
        return PlainMatrices<uint16_t>{reinterpret_cast<const uint16_t*>(w.const_data_ptr<BFloat16>()), n};
      });
    }
  }
};

// x float32 [..., d], chosen int64 [..., K], weights float32 [..., K] and the experts' stacks; `shared` is none, or w1, w3
// and w2 of one more that every token takes with weight 1. float32 [..., d].
Tensor experts(const Tensor& input, const Tensor& chosen, const Tensor& weights, const Tensor& w1, const Tensor& w3,
               const Tensor& w2, at::TensorList shared, double limit) {
  const Tensor x = contiguous_float(input, "experts: x");
  const int64_t E = w1.size(0), K = chosen.size(-1), N = rows_of(x);
  TORCH_CHECK_VALUE(chosen.numel() == N * K && weights.numel() == N * K && (shared.empty() || shared.size() == 3),
                    "experts: x ", x.sizes(), " and chosen ", chosen.sizes(), " do not fit");
  const Tensor ids = chosen.contiguous(), gains = contiguous_float(weights, "experts: weights");
  const auto* id = ids.const_data_ptr<int64_t>();
  const float* gain = gains.const_data_ptr<float>();
  std::vector<Pick> picks;
  picks.reserve(N * K);
  for (int64_t i = 0; i < N * K; ++i) {
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < E, "experts: expert ", id[i], " of ", E);
    picks.push_back({id[i], i / K, gain[i]});
  }
  std::stable_sort(picks.begin(), picks.end(), [](const Pick& a, const Pick& b) { return a.expert < b.expert; });
  Tensor out = at::empty_like(x);
  float* to = out.mutable_data_ptr<float>();
  std::memset(to, 0, out.nbytes());
  const Stack routed{w1, w3, w2};
  routed.check(x);
  routed.add(x, picks, static_cast<float>(limit), to);
  if (!shared.empty()) {
    const Stack all{shared[0], shared[1], shared[2]};
    all.check(x);
    picks.clear();
    for (int64_t t = 0; t < N; ++t) picks.push_back({0, t, 1.0f});
    all.add(x, picks, static_cast<float>(limit), to);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("route(Tensor logits, Tensor bias, Tensor? chosen, int k, float scale) -> (Tensor, Tensor)");
  m.def(
      "experts(Tensor x, Tensor chosen, Tensor weights, Tensor w1, Tensor w3, Tensor w2, Tensor[] shared, float limit) "
      "-> Tensor");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("route", route);
  m.impl("experts", experts);
}

}  // namespace fiftyfold

// The gated delta rule with a decay per channel, one token after another.
#include "../native/common.h"

namespace fiftyfold {
namespace {

// row *= decay, then sums += key * row.
inline void decay_row(float* __restrict row, float decay, float key, float* __restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    row[i] *= decay;
    sums[i] += key * row[i];
  }
}

// row += key * change, then sums += query * row.
inline void change_row(float* __restrict row, float key, const float* __restrict change, float query,
                       float* __restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    row[i] += key * change[i];
    sums[i] += query * row[i];
  }
}

// q, k and g float32 [B, S, H, K], v [B, S, H, V], beta [B, S, H], state [B, H, K, V] and positions int64 [B, S] or
// none -> out [B, S, H, V] and the state after the last token.
std::tuple<Tensor, Tensor> gated_delta_rule(const Tensor& queries, const Tensor& keys, const Tensor& values,
                                            const Tensor& logs, const Tensor& steps,
                                            const std::optional<Tensor>& before,
                                            const std::optional<Tensor>& positions) {
  const Tensor q = contiguous_float(queries, "gated_delta_rule: q"), k = contiguous_float(keys, "gated_delta_rule: k"),
               v = contiguous_float(values, "gated_delta_rule: v"), g = contiguous_float(logs, "gated_delta_rule: g"),
               beta = contiguous_float(steps, "gated_delta_rule: beta");
  TORCH_CHECK_VALUE(q.dim() == 4 && q.sizes() == k.sizes() && q.sizes() == g.sizes() && v.dim() == 4 &&
                        v.sizes().slice(0, 3) == q.sizes().slice(0, 3) && beta.sizes() == q.sizes().slice(0, 3),
                    "gated_delta_rule: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(), ", g ", g.sizes(),
                    " and beta ", beta.sizes(), " do not match");
  const int64_t B = q.size(0), S = q.size(1), H = q.size(2), K = q.size(3), V = v.size(3);
  Tensor out = at::empty_like(v), state = at::empty({B, H, K, V}, q.options());
  Tensor start;
  if (before) {
    start = contiguous_float(*before, "gated_delta_rule: state");
    TORCH_CHECK_VALUE(start.sizes() == state.sizes(), "gated_delta_rule: expected a state ", state.sizes(), ", found ",
                      start.sizes());
  }
  Tensor places;
  if (positions) {
    places = positions->contiguous();
    TORCH_CHECK_VALUE(places.sizes() == at::IntArrayRef({B, S}) && places.scalar_type() == at::kLong,
                      "gated_delta_rule: expected positions int64 [", B, ", ", S, "]");
  }
  const int64_t* place = positions ? places.const_data_ptr<int64_t>() : nullptr;
  float *rows = state.mutable_data_ptr<float>(), *to = out.mutable_data_ptr<float>();
  const float *pq = q.const_data_ptr<float>(), *pk = k.const_data_ptr<float>(), *pv = v.const_data_ptr<float>(),
              *pg = g.const_data_ptr<float>(), *pbeta = beta.const_data_ptr<float>(),
              *first = before ? start.const_data_ptr<float>() : nullptr;
  parallel_rows(B * H, 2 * S * K * V, [&](int64_t i) {
    const int64_t b = i / H, h = i % H;
    float* own = rows + i * K * V;
    if (first) {
      std::memcpy(own, first + i * K * V, 4 * K * V);
    } else {
      std::fill(own, own + K * V, 0.0f);
    }
    std::vector<float> change(V);
    for (int64_t t = b * S; t < (b + 1) * S; ++t) {
      if (place && !place[t]) std::fill(own, own + K * V, 0.0f);  // a document begins
      const int64_t token = t * H + h;
      const float *query = pq + token * K, *key = pk + token * K, *log = pg + token * K, *value = pv + token * V;
      float* answer = to + token * V;
      std::fill(change.begin(), change.end(), 0.0f);
      std::fill(answer, answer + V, 0.0f);
      for (int64_t r = 0; r < K; ++r) decay_row(own + r * V, exp_of(log[r]), key[r], change.data(), V);
      for (int64_t c = 0; c < V; ++c) change[c] = pbeta[token] * (value[c] - change[c]);
      for (int64_t r = 0; r < K; ++r) change_row(own + r * V, key[r], change.data(), query[r], answer, V);
    }
  });
  return {out, state};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def(
      "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, Tensor? positions) -> "
      "(Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("gated_delta_rule", gated_delta_rule); }

}  // namespace fiftyfold

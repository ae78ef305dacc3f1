// Projections of an attention layer for few tokens: matrix products fused with normalization and rotation.
#include "../native/rows.h"

namespace fiftyfold {
namespace {

// Product of x [B, S, in] with weight [out, in]: [B, S, out].
Tensor product(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() == 3 && weight.dim() == 2 && weight.is_contiguous() && x.size(2) == weight.size(1),
                    "projection: x ", x.sizes(), " and weight ", weight.sizes(), " do not match");
  Tensor y = at::empty({x.size(0), x.size(1), weight.size(0)}, x.options());
  auto* from = const_cast<float*>(x.const_data_ptr<float>());
  multiply({from, rows_of(x), x.size(2)}, weight, 0, {y.mutable_data_ptr<float>(), rows_of(x), weight.size(0)});
  return y;
}

// Returns the latent, float32 [B, S, rank] (product of x with wq_a, normalized), and the query, float32 [B, S, heads, c]
// (product of the latent with wq_b, normalized and rotated per head).
std::tuple<Tensor, Tensor> latent_query(const Tensor& input, const Tensor& wq_a, const Tensor& norm, const Tensor& wq_b,
                                        const Tensor& cos, const Tensor& sin, int64_t heads, double eps) {
  const Tensor x = contiguous_float(input, "latent_query: x");
  Tensor latent = product(x, wq_a);
  const int64_t B = x.size(0), S = x.size(1), rank = latent.size(2);
  float* rows = latent.mutable_data_ptr<float>();
  for (int64_t t = 0; t < B * S; ++t) {
    normalize_row(rows + t * rank, rank, norm.const_data_ptr<float>(), static_cast<float>(eps), rows + t * rank);
  }
  Tensor query = product(latent, wq_b);
  const int64_t c = query.size(2) / heads;
  const Angles angles(cos, sin, B, S);
  float* head = query.mutable_data_ptr<float>();
  for (int64_t i = 0; i < B * S * heads; ++i, head += c) {
    normalize_row(head, c, nullptr, static_cast<float>(eps), head);
    angles.rotate(i / heads, head, c, false, head);
  }
  return {latent, query.view({B, S, heads, c})};
}

// Product of x with wkv, normalized, rotated and packed: uint8 [B, S, nbytes].
Tensor packed_key_value(const Tensor& input, const Tensor& wkv, const Tensor& norm, const Tensor& cos, const Tensor& sin,
                        double eps, at::IntArrayRef spec) {
  const Layout layout(spec);
  const Tensor x = contiguous_float(input, "packed_key_value: x");
  Tensor kv = product(x, wkv);
  const int64_t B = x.size(0), S = x.size(1), c = kv.size(2), nbytes = layout.nbytes();
  TORCH_CHECK_VALUE(c == layout.size(), "packed_key_value: expected ", layout.size(), " dims, found ", c);
  const Angles angles(cos, sin, B, S);
  Tensor packed = at::empty({B, S, nbytes}, x.options().dtype(at::kByte));
  float* row = kv.mutable_data_ptr<float>();
  for (int64_t t = 0; t < B * S; ++t, row += c) {
    normalize_row(row, c, norm.const_data_ptr<float>(), static_cast<float>(eps), row);
    angles.rotate(t, row, c, false, row);
    pack_row(row, layout, packed.mutable_data_ptr<uint8_t>() + t * nbytes);
  }
  return packed;
}

// Rotate attended, float32 [B, S, H, c], back and project it by wo_a [g, rank, H / g * c] and wo_b [hidden, g * rank].
Tensor grouped_output(const Tensor& input, const Tensor& cos, const Tensor& sin, const Tensor& wo_a, const Tensor& wo_b) {
  const Tensor attended = contiguous_float(input, "grouped_output: attended");
  const int64_t B = attended.size(0), S = attended.size(1), H = attended.size(2), c = attended.size(3), width = H * c;
  const int64_t groups = wo_a.size(0), rank = wo_a.size(1), in = wo_a.size(2);
  TORCH_CHECK_VALUE(wo_a.is_contiguous() && groups * in == width, "grouped_output: attended ", attended.sizes(), " and wo_a ",
                    wo_a.sizes(), " do not match");
  const Angles angles(cos, sin, B, S);
  std::vector<float> rotated(B * S * width);
  for (int64_t i = 0; i < B * S * H; ++i) {
    angles.rotate(i / H, attended.const_data_ptr<float>() + i * c, c, true, rotated.data() + i * c);
  }
  Tensor inner = at::empty({B, S, groups * rank}, attended.options());
  float* to = inner.mutable_data_ptr<float>();
  for (int64_t g = 0; g < groups; ++g) {
    multiply({rotated.data() + g * in, B * S, width}, wo_a, g, {to + g * rank, B * S, groups * rank});
  }
  return product(inner, wo_b);
}

// Product of the latent with wq_b, rotated by position and by the Hadamard matrix: float32 [B, S, heads, c].
Tensor index_query(const Tensor& input, const Tensor& wq_b, const Tensor& cos, const Tensor& sin, int64_t heads) {
  const Tensor latent = contiguous_float(input, "index_query: latent");
  Tensor query = product(latent, wq_b);
  const int64_t B = query.size(0), S = query.size(1), c = query.size(2) / heads;
  TORCH_CHECK_VALUE((c & (c - 1)) == 0, "index_query: the dims of a head must be a power of two, found ", c);
  const Angles angles(cos, sin, B, S);
  float* head = query.mutable_data_ptr<float>();
  for (int64_t i = 0; i < B * S * heads; ++i, head += c) {
    angles.rotate(i / heads, head, c, false, head);
    hadamard_row(head, c);
  }
  return query.view({B, S, heads, c});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def(
      "latent_query(Tensor x, Tensor wq_a, Tensor norm, Tensor wq_b, Tensor cos, Tensor sin, int heads, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "packed_key_value(Tensor x, Tensor wkv, Tensor norm, Tensor cos, Tensor sin, float eps, int[] layout) -> Tensor");
  m.def("grouped_output(Tensor attended, Tensor cos, Tensor sin, Tensor wo_a, Tensor wo_b) -> Tensor");
  m.def("index_query(Tensor latent, Tensor wq_b, Tensor cos, Tensor sin, int heads) -> Tensor");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("latent_query", latent_query);
  m.impl("packed_key_value", packed_key_value);
  m.impl("grouped_output", grouped_output);
  m.impl("index_query", index_query);
}

}  // namespace fiftyfold

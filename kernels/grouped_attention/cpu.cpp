// Attention of grouped heads over the packed keys and values of a cache.
#include "../native/attention.h"

namespace fiftyfold {
namespace {

// query float32 [B, S, H, c]. Rows of the pages, `storage` uint8 [rows, nbytes] with the page table int64 [B, P], hold a key
// of c dims and a value of c dims for each of kv_heads heads. Queries attend to the first visible[b, s] rows, int64
// [B or 1, S], at least one. Returns float32 [B, S, H, c].
Tensor grouped_attention(const Tensor& queries, const Tensor& storage, const Tensor& page_table, int64_t page_size,
                         const Tensor& visible, int64_t kv_heads, at::IntArrayRef spec, double scale) {
  const Layout layout(spec);
  const Tensor query = contiguous_float(queries, "grouped_attention: query");
  const Tensor table = page_table.contiguous(), limits = visible.contiguous();
  TORCH_CHECK_VALUE(query.dim() == 4 && kv_heads >= 1 && query.size(2) % kv_heads == 0 &&
                        layout.size() == kv_heads * 2 * query.size(3),
                    "grouped_attention: query ", query.sizes(), " does not match ", kv_heads,
                    " key-value heads in rows of ", layout.size(), " dims");
  const int64_t B = query.size(0), S = query.size(1), c = query.size(3);
  TORCH_CHECK_VALUE(S >= 1 && table.dim() == 2 && table.size(0) == B && limits.dim() == 2 && limits.size(1) == S &&
                        (limits.size(0) == 1 || limits.size(0) == B),
                    "grouped_attention: query ", query.sizes(), " does not match the page table ", table.sizes(),
                    " or visible ", limits.sizes());
  TORCH_CHECK_VALUE(storage.is_contiguous() && storage.dim() == 2 && storage.size(1) == layout.nbytes(),
                    "grouped_attention: expected contiguous rows of ", layout.nbytes(), " bytes, found ", storage.sizes());
  const auto* limit = limits.const_data_ptr<int64_t>();
  const int64_t rows = table.size(1) * page_size;
  TORCH_CHECK_VALUE(std::all_of(limit, limit + limits.numel(), [&](int64_t n) { return n >= 1 && n <= rows; }),
                    "grouped_attention: visible must be from 1 to the ", rows, " rows of the page table");
  auto limit_of = [&](int64_t b, int64_t s) {
    return limits.const_data_ptr<int64_t>()[(limits.size(0) == 1 ? 0 : b * S) + s];
  };
  auto pages_of = [&](int64_t b) {
    return Pages{storage.const_data_ptr<uint8_t>(), table.const_data_ptr<int64_t>() + b * table.size(1), page_size,
                 layout.nbytes()};
  };
  const std::vector<float> no_sinks(query.size(2), -INFINITY);
  return attend_in_tiles(query, layout, {kv_heads, 2 * c, c}, pages_of, limit_of, no_sinks.data(),
                         static_cast<float>(scale), c);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def(
      "grouped_attention(Tensor query, Tensor storage, Tensor page_table, int page_size, Tensor visible, int kv_heads, "
      "int[] layout, float scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("grouped_attention", grouped_attention); }

}  // namespace fiftyfold

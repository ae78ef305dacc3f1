// Attention over the packed rows of a cache: a sliding window, compressed entries and a sink in one softmax.
#include "../native/attention.h"

namespace fiftyfold {
namespace {

// Unpacked rows [count, c] and, if many queries share them, also their transpose [c, stride].
struct SharedRows {
  std::vector<float> rows, transposed;
  int64_t c, stride;

  SharedRows(int64_t count, int64_t c, bool transpose)
      : rows(count * c), transposed(transpose ? count * c : 0), c(c), stride(count) {}

  void unpack(int64_t i, const uint8_t* packed, const Layout& layout) {
    float* row = rows.data() + i * c;
    unpack_row(packed, layout, row);
    for (int64_t d = 0; !transposed.empty() && d < c; ++d) transposed[d * stride + i] = row[d];
  }

  void logits(const float* query, int64_t heads, int64_t first, int64_t count, float* out, int64_t out_stride) const {
    if (transposed.empty()) {
      logits_of_keys(query, heads, rows.data() + first * c, c, count, c, out, out_stride);
    } else {
      logits_of_transposed(query, heads, transposed.data() + first, stride, count, c, out, out_stride);
    }
  }
};

// Replace the logits of one head by softmax weights. The sink adds to the sum and has no weight of its own.
void softmax_with_sink(float* logits, int64_t n, float sink) {
  float peak = sink;
#pragma omp simd reduction(max : peak)
  for (int64_t j = 0; j < n; ++j) peak = std::max(peak, logits[j]);
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    logits[j] = exp_of(logits[j] - peak);
    total += logits[j];
  }
  const float inverse = 1.0f / (total + exp_of(sink - peak));
  for (int64_t j = 0; j < n; ++j) logits[j] *= inverse;
}

// query float32 [B, S, H, c], at positions first[b] + s. The row of position p in window_rows, uint8 [B, R, nbytes], is
// (p - offset[b]) mod R; without window_rows there is no window. Entries are in storage, uint8 [rows, nbytes], with the page
// table int64 [B, P]. Queries attend to those of `chosen`, int64 [B, S, K] (-1: none), or else to the first visible[b, s],
// int64 [B or 1, S]. Values are the first value_size dims of a row. Returns float32 [B, S, H, value_size].
Tensor paged_attention(const Tensor& queries, const std::optional<Tensor>& window_rows, const std::optional<Tensor>& offsets,
                        const std::optional<Tensor>& positions, int64_t window, const std::optional<Tensor>& storage, const std::optional<Tensor>& page_table,
                        int64_t page_size, const std::optional<Tensor>& chosen, const std::optional<Tensor>& visible,
                        const Tensor& sinks, at::IntArrayRef spec, double softmax_scale, int64_t value_size) {
  const Layout layout(spec);
  const Tensor query = contiguous_float(queries, "paged_attention: query");
  const Tensor sink = contiguous_float(sinks, "paged_attention: sink");
  const bool windowed = window_rows.has_value();
  const Tensor rows = windowed ? window_rows->contiguous() : Tensor();
  const int64_t B = query.size(0), S = query.size(1), H = query.size(2), c = query.size(3), R = windowed ? rows.size(1) : 0;
  TORCH_CHECK_VALUE(query.dim() == 4 && c == layout.size() && sink.numel() == H && value_size >= 1 && value_size <= c,
                    "paged_attention: query ", query.sizes(), " does not match the layout, sink or values");
  TORCH_CHECK_VALUE(windowed == (window > 0) && windowed == positions.has_value() && windowed == offsets.has_value() &&
                        (windowed || storage),
                    "paged_attention: expected a window of tokens or entries");
  TORCH_CHECK_VALUE(!windowed || (rows.size(2) == layout.nbytes() && rows.size(0) == B && R >= window - 1 + S),
                    "paged_attention: query ", query.sizes(), " and window rows do not match");
  TORCH_CHECK_VALUE(S >= 1 && !(chosen && visible) && (!storage || storage->is_contiguous()),
                    "paged_attention: expected at least one token, contiguous entries, and not both chosen and visible");
  const Tensor starts = windowed ? positions->contiguous() : Tensor(), origins = windowed ? offsets->contiguous() : Tensor();
  auto of = [](const Tensor& t, int64_t b) { return t.const_data_ptr<int64_t>()[t.numel() == 1 ? 0 : b]; };
  const Tensor table = page_table ? page_table->contiguous() : Tensor();
  const Tensor picks = chosen ? chosen->contiguous() : Tensor(), limits = visible ? visible->contiguous() : Tensor();
  const int64_t K = chosen ? picks.size(2) : 0, nbytes = layout.nbytes();
  auto limit_of = [&](int64_t b, int64_t s) {
    return visible ? limits.const_data_ptr<int64_t>()[(limits.size(0) == 1 ? 0 : b * S) + s] : 0;
  };
  auto pages_of = [&](int64_t b) {
    return Pages{storage->const_data_ptr<uint8_t>(), table.const_data_ptr<int64_t>() + b * table.size(1), page_size, nbytes};
  };

  const auto scale = static_cast<float>(softmax_scale);
  if (!windowed && visible) {
    return attend_in_tiles(query, layout, {1, c, 0}, pages_of, limit_of, sink.const_data_ptr<float>(), scale, value_size);
  }
  // Unpack rows that queries share once: tokens from the oldest in the window of the first query, and visible entries.
  const int64_t span = window - 1 + S;
  std::vector<SharedRows> near, far;
  auto oldest_of = [&](int64_t b) { return std::max<int64_t>(0, of(starts, b) - (window - 1)); };
  for (int64_t b = 0; b < B; ++b) {
    if (windowed) {
      const int64_t oldest = oldest_of(b), tokens = of(starts, b) + S - oldest, shift = of(origins, b);
      const auto* from = rows.const_data_ptr<uint8_t>() + b * R * nbytes;
      near.emplace_back(span, c, S > 1);
      parallel_rows(tokens, 2 * c, [&](int64_t i) { near[b].unpack(i, from + (oldest + i - shift) % R * nbytes, layout); });
    }
    if (visible) {
      const Pages pages = pages_of(b);
      const int64_t entries = limit_of(b, S - 1);
      far.emplace_back(entries, c, S > 1);
      parallel_rows(entries, 2 * c, [&](int64_t i) { far[b].unpack(i, pages.row(i), layout); });
    }
  }

  Tensor out = at::empty({B, S, H, value_size}, query.options());
  const int64_t groups = (H + kHeadGroup - 1) / kHeadGroup;
  // Few queries: distribute their heads over threads. Many: a thread unpacks the entries of a query once for all heads.
  const int64_t split = B * S < 2 * at::get_num_threads() ? groups : 1, per_item = (groups + split - 1) / split * kHeadGroup;
  parallel_ranges(B * S * split, per_item * c * (window + K + 1) / 8 + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> logits, gathered(K * c), scaled(per_item * c);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t at = item / split, b = at / S, s = at % S;
      const int64_t head = item % split * per_item, heads = std::min(per_item, H - head);
      int64_t from = 0, tokens = 0;  // rows of the window among the unpacked ones
      if (windowed) {
        const int64_t position = of(starts, b) + s, oldest = oldest_of(b);
        const int64_t begin = std::max<int64_t>(oldest, position - (window - 1));
        from = begin - oldest, tokens = position - begin + 1;
      }
      const float* entries = visible ? far[b].rows.data() : gathered.data();
      int64_t count = visible ? std::min(limit_of(b, s), far[b].stride) : 0;
      if (chosen) {
        const Pages pages = pages_of(b);
        const auto* pick = picks.const_data_ptr<int64_t>() + at * K;
        for (int64_t i = 0; i < K; ++i) {
          if (pick[i] >= 0) unpack_row(pages.row(pick[i]), layout, gathered.data() + count++ * c);
        }
      }
      const int64_t n = tokens + count;
      logits.resize(per_item * n);
      const float* q = query.const_data_ptr<float>() + (at * H + head) * c;
      for (int64_t i = 0; i < heads * c; ++i) scaled[i] = q[i] * scale;
      float* result = out.mutable_data_ptr<float>() + (at * H + head) * value_size;
      std::memset(result, 0, heads * value_size * sizeof(float));
      for (int64_t h = 0; h < heads; h += kHeadGroup) {
        const int64_t group = std::min(kHeadGroup, heads - h);
        if (windowed) near[b].logits(scaled.data() + h * c, group, from, tokens, logits.data() + h * n, n);
        if (visible) {
          far[b].logits(scaled.data() + h * c, group, 0, count, logits.data() + h * n + tokens, n);
        } else {
          logits_of_keys(scaled.data() + h * c, group, entries, c, count, c, logits.data() + h * n + tokens, n);
        }
        for (int64_t g = h; g < h + group; ++g) softmax_with_sink(logits.data() + g * n, n, sink.const_data_ptr<float>()[head + g]);
        float* to = result + h * value_size;
        if (windowed) add_values(logits.data() + h * n, n, group, near[b].rows.data() + from * c, tokens, c, value_size, to);
        add_values(logits.data() + h * n + tokens, n, group, entries, count, c, value_size, to);
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def(
      "paged_attention(Tensor query, Tensor? window_rows, Tensor? offsets, Tensor? positions, int window, Tensor? storage, "
      "Tensor? page_table, int page_size, Tensor? chosen, Tensor? visible, Tensor sink, int[] layout, float scale, "
      "int value_size) -> Tensor");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("paged_attention", paged_attention); }

}  // namespace fiftyfold

// Attention over the packed rows of a cache: a sliding window, compressed entries and a sink in one softmax.
#include "../native/common.h"

namespace fiftyfold {
namespace {

constexpr int64_t kHeadGroup = 4;  // heads that share the loads of a key

// logits[h * stride + j] = query[h] . keys[j], for query [heads, c], heads <= kHeadGroup, and keys [count, c].
void logits_of_keys(const float* query, int64_t heads, const float* keys, int64_t count, int64_t c, float* logits,
                    int64_t stride) {
  for (int64_t j = 0; j < count; ++j) {
    const float* key = keys + j * c;
    if (heads == kHeadGroup) {
      float sums[4];
      dot4(key, query, c, c, sums);
      for (int64_t h = 0; h < 4; ++h) logits[h * stride + j] = sums[h];
    } else {
      for (int64_t h = 0; h < heads; ++h) logits[h * stride + j] = dot(key, query + h * c, c);
    }
  }
}

// logits_of_keys for transposed keys: dim i of key j is keys[i * key_stride + j]. Sums need no shuffles.
void logits_of_transposed(const float* query, int64_t heads, const float* keys, int64_t key_stride, int64_t count, int64_t c,
                          float* logits, int64_t stride) {
  constexpr int64_t kPart = 32;
  int64_t j = 0;
  for (; heads == kHeadGroup && j + kPart <= count; j += kPart) {
    float s0[kPart] = {}, s1[kPart] = {}, s2[kPart] = {}, s3[kPart] = {};
    for (int64_t i = 0; i < c; ++i) {
      const float* key = keys + i * key_stride + j;
      const float q0 = query[i], q1 = query[c + i], q2 = query[2 * c + i], q3 = query[3 * c + i];
      for (int64_t k = 0; k < kPart; ++k) {
        s0[k] += q0 * key[k];
        s1[k] += q1 * key[k];
        s2[k] += q2 * key[k];
        s3[k] += q3 * key[k];
      }
    }
    std::memcpy(logits + j, s0, sizeof(s0));
    std::memcpy(logits + stride + j, s1, sizeof(s1));
    std::memcpy(logits + 2 * stride + j, s2, sizeof(s2));
    std::memcpy(logits + 3 * stride + j, s3, sizeof(s3));
  }
  for (int64_t h = 0; j < count && h < heads; ++h) {
    float* to = logits + h * stride;
    for (int64_t k = j; k < count; ++k) to[k] = 0;
    for (int64_t i = 0; i < c; ++i) {
      const float q = query[h * c + i];
      const float* key = keys + i * key_stride;
      for (int64_t k = j; k < count; ++k) to[k] += q * key[k];
    }
  }
}

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
      logits_of_keys(query, heads, rows.data() + first * c, count, c, out, out_stride);
    } else {
      logits_of_transposed(query, heads, transposed.data() + first, stride, count, c, out, out_stride);
    }
  }
};

// out[h] += sum_j weights[h * stride + j] values[j], for the first `size` dims of values [count, c] and out [heads, size].
void add_values(const float* weights, int64_t stride, int64_t heads, const float* values, int64_t count, int64_t c, int64_t size,
                float* out) {
  constexpr int64_t kColumns = 64;
  for (int64_t h = 0; h < heads; h += 4) {
    for (int64_t column = 0; column < size; column += kColumns) {
      const int64_t width = std::min(kColumns, size - column);
      if (heads - h >= 4 && width == kColumns) {
        float s0[kColumns] = {}, s1[kColumns] = {}, s2[kColumns] = {}, s3[kColumns] = {};
        const float *w0 = weights + h * stride, *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride;
        for (int64_t j = 0; j < count; ++j) {
          const float* value = values + j * c + column;
          for (int64_t i = 0; i < kColumns; ++i) {
            s0[i] += w0[j] * value[i];
            s1[i] += w1[j] * value[i];
            s2[i] += w2[j] * value[i];
            s3[i] += w3[j] * value[i];
          }
        }
        float* to = out + h * size + column;
        for (int64_t i = 0; i < kColumns; ++i) {
          to[i] += s0[i], to[size + i] += s1[i], to[2 * size + i] += s2[i], to[3 * size + i] += s3[i];
        }
      } else {
        for (int64_t g = h; g < std::min(heads, h + 4); ++g) {
          for (int64_t j = 0; j < count; ++j) {
            const float weight = weights[g * stride + j];
            const float* value = values + j * c + column;
            for (int64_t i = 0; i < width; ++i) out[g * size + column + i] += weight * value[i];
          }
        }
      }
    }
  }
}

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

constexpr int64_t kTile = 64;  // keys that are unpacked together
constexpr int64_t kRows = 32;  // rows (heads of neighboring queries) that share a tile, or the heads of one query

// Attention of queries float32 [B, S, H, c] to the first limit_of(b, s) entries of pages_of(b), which does not decrease in
// s, by an online softmax over tiles of keys: memory does not grow with the number of entries.
template <typename PagesOf, typename LimitOf>
Tensor attend_in_tiles(const Tensor& query, const Layout& layout, PagesOf pages_of, LimitOf limit_of, const float* sinks,
                       float scale, int64_t size) {
  const int64_t B = query.size(0), S = query.size(1), H = query.size(2), c = query.size(3);
  const int64_t together = std::max<int64_t>(1, kRows / H), blocks = (S + together - 1) / together;
  // Few queries: distribute their keys over threads, each with a softmax of its own.
  const int64_t parts = std::max<int64_t>(1, at::get_num_threads() / (B * blocks)), rows = together * H;
  Tensor out = at::empty({B, S, H, size}, query.options());
  float* result = out.mutable_data_ptr<float>();
  std::vector<float> peaks(B * blocks * parts * rows), totals(peaks.size()), sums(parts > 1 ? peaks.size() * size : 0);
  auto sums_of = [&](int64_t block, int64_t part) {
    const int64_t first = block / blocks * S + block % blocks * together;
    return parts > 1 ? sums.data() + (block * parts + part) * rows * size : result + first * H * size;
  };
  auto count_of = [&](int64_t block) { return std::min(together, S - block % blocks * together); };
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) longest = std::max<int64_t>(longest, limit_of(b, S - 1));
  const int64_t grain = std::max<int64_t>(1, kGrain / (2 * rows * c * (longest / parts + 1)));
  at::parallel_for(0, B * blocks * parts, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scaled(rows * c), keys(kTile * c), transposed(kTile * c), logits(kHeadGroup * kTile);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / parts, part = item % parts, b = block / blocks, first = block % blocks * together;
      const int64_t count = count_of(block), tiles = (limit_of(b, first + count - 1) + kTile - 1) / kTile;
      const float* q = query.const_data_ptr<float>() + (b * S + first) * H * c;
      for (int64_t i = 0; i < count * H * c; ++i) scaled[i] = q[i] * scale;
      float *peak = peaks.data() + item * rows, *total = totals.data() + item * rows, *sum = sums_of(block, part);
      std::fill(peak, peak + rows, -INFINITY);
      std::fill(total, total + rows, 0.0f);
      std::fill(sum, sum + count * H * size, 0.0f);
      const Pages pages = pages_of(b);
      const bool transposes = count * H >= 4 * kHeadGroup;
      for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
        const int64_t oldest = tile * kTile, n = std::min(kTile, limit_of(b, first + count - 1) - oldest);
        for (int64_t i = 0; i < n; ++i) {
          unpack_row(pages.row(oldest + i), layout, keys.data() + i * c);
          for (int64_t d = 0; transposes && d < c; ++d) transposed[d * kTile + i] = keys[i * c + d];
        }
        for (int64_t row = 0; row < count * H;) {
          const int64_t s = row / H, group = std::min(kHeadGroup, (s + 1) * H - row);
          const int64_t seen = std::min(n, limit_of(b, first + s) - oldest);
          if (seen > 0) {
            const float* own = scaled.data() + row * c;
            if (transposes) {
              logits_of_transposed(own, group, transposed.data(), kTile, seen, c, logits.data(), kTile);
            } else {
              logits_of_keys(own, group, keys.data(), seen, c, logits.data(), kTile);
            }
            for (int64_t g = 0; g < group; ++g) {
              float* weights = logits.data() + g * kTile;
              float most = peak[row + g], added = 0;
              for (int64_t j = 0; j < seen; ++j) most = std::max(most, weights[j]);
              const float fade = exp_of(peak[row + g] - most);
#pragma omp simd reduction(+ : added)
              for (int64_t j = 0; j < seen; ++j) {
                weights[j] = exp_of(weights[j] - most);
                added += weights[j];
              }
              total[row + g] = total[row + g] * fade + added;
              peak[row + g] = most;
              for (int64_t i = 0; fade != 1.0f && i < size; ++i) sum[(row + g) * size + i] *= fade;
            }
            add_values(logits.data(), kTile, group, keys.data(), seen, c, size, sum + row * size);
          }
          row += group;
        }
      }
    }
  });
  // Join the parts and the sink.
  for (int64_t block = 0; block < B * blocks; ++block) {
    const int64_t first = block / blocks * S + block % blocks * together;
    for (int64_t row = 0; row < count_of(block) * H; ++row) {
      const float sink = sinks[row % H];
      const auto place = [&](int64_t part) { return (block * parts + part) * rows + row; };
      float most = sink;
      for (int64_t part = 0; part < parts; ++part) most = std::max(most, peaks[place(part)]);
      float total = exp_of(sink - most);
      for (int64_t part = 0; part < parts; ++part) total += totals[place(part)] * exp_of(peaks[place(part)] - most);
      float* to = result + (first * H + row) * size;
      for (int64_t part = 0; part < parts; ++part) {
        const float weight = exp_of(peaks[place(part)] - most) / total, *from = sums_of(block, part) + row * size;
        for (int64_t i = 0; i < size; ++i) to[i] = weight * from[i] + (part ? to[i] : 0.0f);
      }
    }
  }
  return out;
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
    return attend_in_tiles(query, layout, pages_of, limit_of, sink.const_data_ptr<float>(), scale, value_size);
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
  at::parallel_for(0, B * S * split, std::max<int64_t>(1, kGrain / (per_item * c * (window + K + 1) / 8 + 1)),
                   [&](int64_t begin, int64_t end) {
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
          logits_of_keys(scaled.data() + h * c, group, entries, count, c, logits.data() + h * n + tokens, n);
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

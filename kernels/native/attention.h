// Attention of few queries over packed rows, shared by several operators.
#pragma once

#include "common.h"

namespace fiftyfold {

constexpr int64_t kHeadGroup = 4;  // heads that share the loads of a key

// logits[h * stride + j] = query[h] . keys[j], for query [heads, c], heads <= kHeadGroup, and `count` keys of c dims,
// key_stride apart.
inline void logits_of_keys(const float* query, int64_t heads, const float* keys, int64_t key_stride, int64_t count,
                           int64_t c, float* logits, int64_t stride) {
  for (int64_t j = 0; j < count; ++j) {
    const float* key = keys + j * key_stride;
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
inline void logits_of_transposed(const float* query, int64_t heads, const float* keys, int64_t key_stride, int64_t count,
                                 int64_t c, float* logits, int64_t stride) {
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

// out[h] += sum_j weights[h * stride + j] values[j], for the first `size` dims of `count` values, value_stride apart, and out
// [heads, size].
inline void add_values(const float* weights, int64_t stride, int64_t heads, const float* values, int64_t count,
                       int64_t value_stride, int64_t size, float* out) {
  constexpr int64_t kColumns = 64;
  for (int64_t h = 0; h < heads; h += 4) {
    for (int64_t column = 0; column < size; column += kColumns) {
      const int64_t width = std::min(kColumns, size - column);
      if (heads - h >= 4 && width == kColumns) {
        float s0[kColumns] = {}, s1[kColumns] = {}, s2[kColumns] = {}, s3[kColumns] = {};
        const float *w0 = weights + h * stride, *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride;
        for (int64_t j = 0; j < count; ++j) {
          const float* value = values + j * value_stride + column;
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
            const float* value = values + j * value_stride + column;
            for (int64_t i = 0; i < width; ++i) out[g * size + column + i] += weight * value[i];
          }
        }
      }
    }
  }
}

constexpr int64_t kTile = 64;  // keys that are unpacked together
constexpr int64_t kRows = 32;  // rows (heads of neighboring queries) that share a tile, or the heads of one query

// Where the keys and values of heads are in a row: H / count heads share the key from dim head * stride and the value from
// dim head * stride + value.
struct KeyValueHeads {
  int64_t count, stride, value;
};

// Attention of queries float32 [B, S, H, c] to the first limit_of(b, s) entries of pages_of(b), which does not decrease in
// s, by an online softmax over tiles of keys: memory does not grow with the number of entries. Values have `size` dims.
template <typename PagesOf, typename LimitOf>
Tensor attend_in_tiles(const Tensor& query, const Layout& layout, const KeyValueHeads& kv, PagesOf pages_of,
                       LimitOf limit_of, const float* sinks, float scale, int64_t size) {
  const int64_t B = query.size(0), S = query.size(1), H = query.size(2), c = query.size(3), width = layout.size();
  const int64_t sharing = H / kv.count;
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
  parallel_ranges(B * blocks * parts, 2 * rows * c * (longest / parts + 1), [&](int64_t begin, int64_t end) {
    std::vector<float> scaled(rows * c), keys(kTile * width), transposed(kTile * width), logits(kHeadGroup * kTile);
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
          unpack_row(pages.row(oldest + i), layout, keys.data() + i * width);
          for (int64_t d = 0; transposes && d < width; ++d) transposed[d * kTile + i] = keys[i * width + d];
        }
        for (int64_t row = 0; row < count * H;) {
          const int64_t s = row / H, head = row % H / sharing;
          const int64_t group = std::min(kHeadGroup, s * H + (head + 1) * sharing - row);
          const int64_t seen = std::min(n, limit_of(b, first + s) - oldest);
          if (seen > 0) {
            const float* own = scaled.data() + row * c;
            const int64_t key = head * kv.stride;
            if (transposes) {
              logits_of_transposed(own, group, transposed.data() + key * kTile, kTile, seen, c, logits.data(), kTile);
            } else {
              logits_of_keys(own, group, keys.data() + key, width, seen, c, logits.data(), kTile);
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
            add_values(logits.data(), kTile, group, keys.data() + key + kv.value, seen, width, size, sum + row * size);
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

}  // namespace fiftyfold

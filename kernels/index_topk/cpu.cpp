// Lightning indexer over a cache: scores of packed keys, and selection of the best entries of every query.
//
// Keys are transposed tile by tile, so that a vector holds one dim of many keys: sums over dims need no shuffles. All
// queries and heads read a tile from the first-level cache.
#include "../native/common.h"

namespace fiftyfold {
namespace {

constexpr int64_t kKeys = 64;         // keys per tile
constexpr int64_t kQueries = 32;      // queries that share a tile
constexpr int64_t kScores = 1 << 20;  // most scores of several queries that a thread holds

// Keys of any format as float32 [dims][kKeys], padded with zeros.
class FloatTile {
 public:
  FloatTile(const Layout& layout, int64_t heads)
      : layout_(layout), heads_(heads), row_(layout.size()), keys_(layout.size() * kKeys) {}

  void set_queries(const float* query, const float* weights, int64_t) { query_ = query, weights_ = weights; }

  void load(const Pages& pages, int64_t begin, int64_t count) {
    const int64_t c = layout_.size();
    for (int64_t k = 0; k < kKeys; ++k) {
      if (k < count) {
        unpack_row(pages.row(begin + k), layout_, row_.data());
      } else {
        std::fill(row_.begin(), row_.end(), 0.0f);
      }
      for (int64_t i = 0; i < c; ++i) keys_[i * kKeys + k] = row_[i];
    }
  }

  // scores[k] = sum_h weights[h] * relu(query[h] . keys[:, k]) for query s.
  void score(int64_t s, float* scores) const {
    constexpr int64_t kPart = 32;
    const int64_t c = layout_.size();
    const float *query = query_ + s * heads_ * c, *weights = weights_ + s * heads_;
    for (int64_t k = 0; k < kKeys; ++k) scores[k] = 0;
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t part = 0; part < kKeys; part += kPart) {
        float sum[kPart] = {};
        for (int64_t i = 0; i < c; ++i) {
          const float* key = keys_.data() + i * kKeys + part;
          for (int64_t k = 0; k < kPart; ++k) sum[k] += query[h * c + i] * key[k];
        }
        for (int64_t k = 0; k < kPart; ++k) scores[part + k] += weights[h] * std::max(sum[k], 0.0f);
      }
    }
  }

 private:
  const Layout& layout_;
  int64_t heads_;
  std::vector<float> row_, keys_;
  const float *query_ = nullptr, *weights_ = nullptr;
};

#if defined(__AVX512BW__)
using Bytes = __m512i;
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
inline Bytes fill(int32_t v) { return _mm512_set1_epi32(v); }
inline Bytes table_of(const uint8_t* t) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)t)); }
inline Bytes look_up(Bytes table, Bytes at) { return _mm512_shuffle_epi8(table, at); }
inline Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
inline Bytes add_products(Bytes sum, Bytes keys, Bytes query) {
  return _mm512_add_epi16(sum, _mm512_maddubs_epi16(keys, query));
}
inline Bytes add_pairs(Bytes v) { return _mm512_madd_epi16(v, _mm512_set1_epi16(1)); }
#elif defined(__AVX2__)
using Bytes = __m256i;
inline Bytes load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Bytes fill(int32_t v) { return _mm256_set1_epi32(v); }
inline Bytes table_of(const uint8_t* t) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)t)); }
inline Bytes look_up(Bytes table, Bytes at) { return _mm256_shuffle_epi8(table, at); }
inline Bytes low_nibbles(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
inline Bytes add_products(Bytes sum, Bytes keys, Bytes query) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(keys, query));
}
inline Bytes add_pairs(Bytes v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
#else  // NEON
using Bytes = int8x16_t;
inline Bytes load_bytes(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
inline void store_bytes(void* p, Bytes v) { vst1q_s8(static_cast<int8_t*>(p), v); }
inline Bytes fill(int32_t v) { return (Bytes)vdupq_n_s32(v); }
inline Bytes table_of(const uint8_t* t) { return (Bytes)vld1q_u8(t); }
inline Bytes look_up(Bytes table, Bytes at) { return vqtbl1q_s8(table, (uint8x16_t)at); }
inline Bytes low_nibbles(Bytes v) { return vandq_s8(v, vdupq_n_s8(15)); }
inline Bytes high_nibbles(Bytes v) { return (Bytes)vshrq_n_u8((uint8x16_t)v, 4); }
inline Bytes add_products(Bytes sum, Bytes keys, Bytes query) {
  const int16x8_t low = vmull_s8(vget_low_s8(keys), vget_low_s8(query)), high = vmull_high_s8(keys, query);
  return (Bytes)vaddq_s16((int16x8_t)sum, vpaddq_s16(low, high));
}
inline Bytes add_pairs(Bytes v) { return (Bytes)vpaddlq_s16((int16x8_t)v); }
#endif

// FP4 keys as integers. Doubled FP4 values are integers of magnitude 12 or less: products and sums within a block of 32
// dims are exact in 16 bits. The x86 instruction requires unsigned keys, so 12 is added to them, and its contribution to
// the sum is subtracted. A 32-bit lane holds four dims of a key: the low or the high nibbles of four bytes.
class Fp4Tile {
 public:
  Fp4Tile(const Layout& layout, int64_t heads)
      : layout_(layout), heads_(heads), blocks_(layout.scales), groups_(layout.block / 4),
        keys_(blocks_ * groups_ * kKeys), key_scales_(blocks_ * kKeys) {}

  static bool serves(const Layout& layout) {
    return layout.body_format == kFp4 && layout.rope == 0 && layout.block % 8 == 0 && layout.body % layout.block == 0;
  }

  // query float32 [queries, heads, c], rounded to FP4; weights [queries, heads].
  void set_queries(const float* query, const float* weights, int64_t queries) {
    weights_ = weights;
    const int64_t rows = queries * heads_, block = layout_.block;
    query_.resize(rows * blocks_ * groups_);
    offsets_.resize(rows * blocks_);
    query_scales_.resize(rows * blocks_);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t b = 0; b < blocks_; ++b) {
        const float* x = query + r * layout_.body + b * block;
        const float scale = e8m0_to_float(e8m0_from_amax(largest_magnitude(x, block), 6.0f, 6.0f * 0x1p-126f));
        auto* lanes = reinterpret_cast<int8_t*>(query_.data() + (r * blocks_ + b) * groups_);
        int32_t sum = 0;
        for (int64_t g = 0; g < groups_; ++g) {
          for (int64_t i = 0; i < 4; ++i) {
            const float value = x[g / 2 * 8 + 2 * i + g % 2];  // even dims are in low nibbles
            const auto doubled = static_cast<int32_t>(std::nearbyint(value / scale * 2.0f));
            lanes[4 * g + i] = static_cast<int8_t>(doubled);
            sum += doubled;
          }
        }
        offsets_[r * blocks_ + b] = 12 * sum;
        query_scales_[r * blocks_ + b] = 0.25f * scale;
      }
    }
  }

  void load(const Pages& pages, int64_t begin, int64_t count) {
    alignas(64) uint32_t words[kKeys];
    constexpr uint8_t kValues[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    const Bytes table = table_of(kValues);
    const int64_t words_per_block = groups_ / 2;
    const uint8_t* rows[kKeys];
    const uint8_t* next = nullptr;
    int64_t left = 0;  // keys left on the current page
    for (int64_t k = 0; k < kKeys; ++k) {
      if (left == 0) next = pages.row(begin + std::min(k, count - 1)), left = pages.page_size - (begin + k) % pages.page_size;
      rows[k] = next;
      if (k + 1 < count) next += pages.nbytes, --left;
    }
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t k = 0; k < kKeys; ++k) key_scales_[b * kKeys + k] = e8m0_to_float(rows[k][layout_.body_bytes + b]);
      for (int64_t g = 0; g < words_per_block; ++g) {
        for (int64_t k = 0; k < kKeys; ++k) std::memcpy(&words[k], rows[k] + 4 * (b * words_per_block + g), 4);
        uint32_t* low = keys_.data() + (b * groups_ + 2 * g) * kKeys;
        for (int64_t k = 0; k < kKeys; k += kLane) {
          const Bytes packed = load_bytes(words + k);
          store_bytes(low + k, look_up(table, low_nibbles(packed)));
          store_bytes(low + kKeys + k, look_up(table, high_nibbles(packed)));
        }
      }
    }
  }

  void score(int64_t s, float* scores) const {
    if (blocks_ == 1) {
      score_block(s, scores);
      return;
    }
    for (int64_t k = 0; k < kKeys; ++k) scores[k] = 0;
    alignas(64) int32_t sums[kKeys];
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t row = (s * heads_ + h) * blocks_;
      float product[kKeys] = {};
      for (int64_t b = 0; b < blocks_; ++b) {
        products(row + b, b, sums);
        const float scale = query_scales_[row + b];
        for (int64_t k = 0; k < kKeys; ++k) {
          product[k] += static_cast<float>(sums[k] - offsets_[row + b]) * (scale * key_scales_[b * kKeys + k]);
        }
      }
      for (int64_t k = 0; k < kKeys; ++k) scores[k] += weights_[s * heads_ + h] * std::max(product[k], 0.0f);
    }
  }

 private:
  static constexpr int64_t kLane = sizeof(Bytes) / 4;

  void products(int64_t row, int64_t block, int32_t* sums) const {
    const uint32_t* query = query_.data() + row * groups_;
    const uint32_t* keys = keys_.data() + block * groups_ * kKeys;
    Bytes sum[kKeys / kLane];
    for (auto& v : sum) v = fill(0);
    for (int64_t g = 0; g < groups_; ++g) {
      const Bytes q = fill(static_cast<int32_t>(query[g]));
      for (int64_t v = 0; v < kKeys / kLane; ++v) sum[v] = add_products(sum[v], load_bytes(keys + g * kKeys + v * kLane), q);
    }
    for (int64_t v = 0; v < kKeys / kLane; ++v) store_bytes(sums + v * kLane, add_pairs(sum[v]));
  }

  // With one block per key, its scale is a common positive factor of all heads and is applied to their sum.
  void score_block(int64_t s, float* scores) const {
    alignas(64) int32_t sums[kKeys];
    float total[kKeys] = {};
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t row = s * heads_ + h;
      products(row, 0, sums);
      const float weight = weights_[row] * query_scales_[row];
      const int32_t offset = offsets_[row];
      for (int64_t k = 0; k < kKeys; ++k) total[k] += weight * static_cast<float>(std::max(sums[k] - offset, 0));
    }
    for (int64_t k = 0; k < kKeys; ++k) scores[k] = total[k] * key_scales_[k];
  }

  const Layout& layout_;
  int64_t heads_, blocks_, groups_;
  std::vector<uint32_t> keys_, query_;
  std::vector<int32_t> offsets_;
  std::vector<float> key_scales_, query_scales_;
  const float* weights_ = nullptr;
};

// Selects the indices of the k best of scores[0, n), best first. Ties go to the lower index, -inf is never selected, and
// unused slots are -1.
class Selector {
 public:
  void select(const float* scores, int64_t n, int64_t k, int64_t* out) {
    found_.clear();
    const float threshold = n > 4 * k && n >= 256 ? lower_bound(scores, n, k) : -INFINITY;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = std::min(n, begin + kBlock);
      if (threshold > -INFINITY && end - begin == kBlock && peaks_[begin / kBlock] < threshold) continue;
      for (int64_t i = begin; i < end; ++i) {
        if (scores[i] >= threshold && scores[i] > -INFINITY) found_.push_back({scores[i], i});
      }
    }
    const auto better = [](const Entry& a, const Entry& b) {
      return a.score != b.score ? a.score > b.score : a.index < b.index;
    };
    const int64_t taken = std::min<int64_t>(k, found_.size());
    std::partial_sort(found_.begin(), found_.begin() + taken, found_.end(), better);
    for (int64_t i = 0; i < k; ++i) out[i] = i < taken ? found_[i].index : -1;
  }

 private:
  struct Entry {
    float score;
    int64_t index;
  };

  static constexpr int64_t kBlock = 16;

  // Return a bound that at least k scores reach: the k-th largest of the maxima of blocks. -inf if there are fewer blocks.
  float lower_bound(const float* scores, int64_t n, int64_t k) {
    const int64_t blocks = n / kBlock;
    peaks_.resize(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      float peak = scores[b * kBlock];
#pragma omp simd reduction(max : peak)
      for (int64_t i = 1; i < kBlock; ++i) peak = std::max(peak, scores[b * kBlock + i]);
      peaks_[b] = peak == peak ? peak : -INFINITY;  // NaN cannot be ordered
    }
    if (blocks < k) return -INFINITY;
    order_.assign(peaks_.begin(), peaks_.end());
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<float>());
    return order_[k - 1];
  }

  std::vector<Entry> found_;
  std::vector<float> peaks_, order_;
};

// Compute scores [queries, stride] of keys begin to end for the queries of the tile.
template <typename Tile>
void score_keys(Tile& tile, int64_t queries, const Pages& pages, int64_t begin, int64_t end, float* scores, int64_t stride) {
  float part[kKeys];
  for (int64_t first = begin; first < end; first += kKeys) {
    const int64_t count = std::min(kKeys, end - first);
    tile.load(pages, first, count);
    for (int64_t s = 0; s < queries; ++s) {
      tile.score(s, part);
      std::memcpy(scores + s * stride + first, part, count * sizeof(float));
    }
  }
}

// query float32 [B, S, h, c], head_weights float32 [B, S, h], storage uint8 [rows, nbytes], page_table int64 [B, P].
// Queries select among the first `visible` entries, int64 [B or 1, S]. `narrow` rounds scores to BF16 before they are
// compared. Returns int64 [B, S, k].
template <typename Tile>
Tensor index_topk_with(const Tensor& queries, const Tensor& head_weights, const Tensor& storage, const Tensor& page_table,
                       int64_t page_size, const Tensor& visible, int64_t k, const Layout& layout, bool narrow) {
  const Tensor query = contiguous_float(queries, "index_topk: query");
  const Tensor weights = contiguous_float(head_weights, "index_topk: weights");
  TORCH_CHECK_VALUE(query.dim() == 4 && query.size(3) == layout.size() && storage.is_contiguous() &&
                        storage.size(1) == layout.nbytes() && k >= 1,
                    "index_topk: query ", query.sizes(), " and keys ", storage.sizes(), " do not match");
  const int64_t B = query.size(0), S = query.size(1), h = query.size(2), c = query.size(3);
  const Tensor limit = visible.contiguous(), table = page_table.contiguous();
  Tensor chosen = at::empty({B, S, k}, query.options().dtype(at::kLong));
  const float *q = query.const_data_ptr<float>(), *w = weights.const_data_ptr<float>();
  const auto* limits = limit.const_data_ptr<int64_t>();
  const bool shared = limit.size(0) == 1;
  auto* out = chosen.mutable_data_ptr<int64_t>();
  auto limit_of = [&](int64_t b, int64_t s) { return limits[(shared ? 0 : b * S) + s]; };
  auto pages_of = [&](int64_t b) {
    return Pages{storage.const_data_ptr<uint8_t>(), table.const_data_ptr<int64_t>() + b * table.size(1), page_size,
                 layout.nbytes()};
  };
  auto round = [&](float* scores, int64_t n) {
    if (!narrow) return;
    for (int64_t i = 0; i < n; ++i) scores[i] = widen(round_to_bf16(scores[i]));
  };
  if (S == 1) {
    // One query per sequence: distribute its keys over threads.
    std::vector<float> scores;
    Selector selector;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t n = limit_of(b, 0);
      scores.resize(n);
      constexpr int64_t kPiece = 4 * kKeys;
      parallel_ranges((n + kPiece - 1) / kPiece, kGrain / 8, [&](int64_t begin, int64_t end) {
        Tile tile(layout, h);
        tile.set_queries(q + b * h * c, w + b * h, 1);
        score_keys(tile, 1, pages_of(b), begin * kPiece, std::min(n, end * kPiece), scores.data(), n);
      });
      round(scores.data(), n);
      selector.select(scores.data(), n, k, out + b * k);
    }
    return chosen;
  }
  // Fewer queries share a tile if there are more keys, which bounds the memory of their scores.
  int64_t longest = 1;
  for (int64_t i = 0; i < limit.numel(); ++i) longest = std::max(longest, limits[i]);
  const int64_t together = std::max<int64_t>(1, std::min(kQueries, kScores / longest)), tiles = (S + together - 1) / together;
  parallel_ranges(B * tiles, kGrain, [&](int64_t begin, int64_t end) {
    Tile tile(layout, h);
    Selector selector;
    std::vector<float> scores;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / tiles, first = item % tiles * together, count = std::min(together, S - first);
      int64_t most = 0;
      for (int64_t s = 0; s < count; ++s) most = std::max(most, limit_of(b, first + s));
      scores.resize(count * most);
      const int64_t at = b * S + first;
      tile.set_queries(q + at * h * c, w + at * h, count);
      score_keys(tile, count, pages_of(b), 0, most, scores.data(), most);
      round(scores.data(), count * most);
      for (int64_t s = 0; s < count; ++s) {
        selector.select(scores.data() + s * most, limit_of(b, first + s), k, out + (at + s) * k);
      }
    }
  });
  return chosen;
}

Tensor index_topk(const Tensor& query, const Tensor& head_weights, const Tensor& storage, const Tensor& page_table,
                  int64_t page_size, const Tensor& visible, int64_t k, at::IntArrayRef spec, bool narrow) {
  const Layout layout(spec);
  if (Fp4Tile::serves(layout)) {
    return index_topk_with<Fp4Tile>(query, head_weights, storage, page_table, page_size, visible, k, layout, narrow);
  }
  return index_topk_with<FloatTile>(query, head_weights, storage, page_table, page_size, visible, k, layout, narrow);
}

// scores float32 [B, S, T], permitted bool [B or 1, S, T]. Returns int64 [B, S, k].
Tensor select_topk(const Tensor& scores, const Tensor& permitted, int64_t k) {
  const Tensor values = contiguous_float(scores, "select_topk: scores"), mask = permitted.contiguous();
  TORCH_CHECK_VALUE(values.dim() == 3 && mask.dim() == 3 && mask.scalar_type() == at::kBool && k >= 1 &&
                        (mask.size(0) == 1 || mask.size(0) == values.size(0)) && mask.size(1) == values.size(1) &&
                        mask.size(2) == values.size(2),
                    "select_topk: scores ", values.sizes(), " and permitted ", mask.scalar_type(), " ", mask.sizes(),
                    " do not match");
  const int64_t B = values.size(0), S = values.size(1), T = values.size(2);
  Tensor chosen = at::empty({B, S, k}, values.options().dtype(at::kLong));
  const float* from = values.const_data_ptr<float>();
  const bool* allowed = mask.const_data_ptr<bool>();
  auto* out = chosen.mutable_data_ptr<int64_t>();
  const bool shared = mask.size(0) == 1;
  parallel_ranges(B * S, T, [&](int64_t begin, int64_t end) {
    Selector selector;
    std::vector<float> row(T);
    for (int64_t i = begin; i < end; ++i) {
      const float* x = from + i * T;
      const bool* may = allowed + (shared ? i % S : i) * T;
      for (int64_t t = 0; t < T; ++t) row[t] = may[t] ? x[t] : -INFINITY;
      selector.select(row.data(), T, k, out + i * k);
    }
  });
  return chosen;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("select_topk(Tensor scores, Tensor permitted, int k) -> Tensor");
  m.def(
      "index_topk(Tensor query, Tensor head_weights, Tensor storage, Tensor page_table, int page_size, Tensor visible, int k, "
      "int[] layout, bool narrow) -> Tensor");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("index_topk", index_topk);
  m.impl("select_topk", select_topk);
}

}  // namespace fiftyfold

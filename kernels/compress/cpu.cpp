// Gated pooling of neighboring tokens.
#include "../native/rows.h"

namespace fiftyfold {
namespace {

// Pools blocks of m tokens with biases [m, w] that are added to the gates. Without overlap, w = c and an entry pools its
// own m rows. With overlap, w = 2c: channels [c:] belong to the block of the row, channels [:c] to the next block.
struct Pooling {
  const float* bias;
  int64_t m, w, c;
  bool overlap;

  Pooling(const Tensor& biases, bool overlaps)
      : bias(biases.const_data_ptr<float>()), m(biases.size(0)), w(biases.size(1)), c(overlaps ? w / 2 : w),
        overlap(overlaps) {}

  // Write an entry [c]. row_at(i) returns row i of the own block, or for a negative i of the one before, if `preceded`.
  template <class RowAt>
  void pool(RowAt row_at, bool preceded, std::vector<float>& peak, std::vector<float>& total, float* result) const {
    std::fill(peak.begin(), peak.end(), -INFINITY);
    std::fill(total.begin(), total.end(), 0.0f);
    std::fill(result, result + c, 0.0f);
    auto each = [&](auto use) {
      for (int64_t i = overlap && preceded ? -m : 0; i < m; ++i) {
        const int64_t place = i < 0 ? i + m : i, channel = overlap && i >= 0 ? c : 0;
        const float* row = row_at(i) + channel;
        use(row, row + w, bias + place * w + channel);
      }
    };
    each([&](const float*, const float* gate, const float* add) {
      for (int64_t j = 0; j < c; ++j) peak[j] = std::max(peak[j], gate[j] + add[j]);
    });
    each([&](const float* value, const float* gate, const float* add) {
      for (int64_t j = 0; j < c; ++j) {
        const float weight = exp_of(gate[j] + add[j] - peak[j]);
        total[j] += weight;
        result[j] += weight * value[j];
      }
    });
    for (int64_t j = 0; j < c; ++j) result[j] /= total[j];
  }
};

// rows float32 [B, n * m, 2w] (values and gates), bias float32 [m, w]. With `has_previous`, the first block has no entry.
// Returns float32 [B, n or n - 1, c].
Tensor compress(const Tensor& input, const Tensor& biases, bool overlap, bool has_previous) {
  const Tensor rows = contiguous_float(input, "compress: rows"), bias = contiguous_float(biases, "compress: bias");
  const Pooling pooling(bias, overlap);
  const int64_t m = pooling.m, w = pooling.w, c = pooling.c, B = rows.size(0), n = rows.size(1) / m;
  TORCH_CHECK_VALUE(rows.dim() == 3 && rows.size(2) == 2 * w && n * m == rows.size(1) && n >= has_previous,
                    "compress: rows ", rows.sizes(), " and bias ", bias.sizes(), " do not match");
  const int64_t made = n - has_previous;
  Tensor out = at::empty({B, made, c}, rows.options());
  const float* x = rows.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  parallel_ranges(B * made, 16 * m * c, [&](int64_t begin, int64_t end) {
    std::vector<float> peak(c), total(c);
    for (int64_t entry = begin; entry < end; ++entry) {
      const int64_t b = entry / made, block = entry % made + has_previous;
      auto row_at = [&](int64_t i) { return x + ((b * n + block) * m + i) * 2 * w; };
      pooling.pool(row_at, block > 0, peak, total, to + entry * c);
    }
  });
  return out;
}

// ring float32 [B, capacity, 2w]: the row of position p is at p % capacity. rows float32 [B, S, 2w] follow `lengths`
// tokens, int64 [B or 1]. Pools the entries that they complete, normalizes them with the weights norm float32 [c], rotates
// the n-th new entry by its angles, float32 [B or 1, N, r], applies the Hadamard matrix if `hadamard`, and writes them to
// pages.
void compress_next(const Tensor& kept, const Tensor& input, const Tensor& biases, const Tensor& tokens, bool overlap,
                   const Tensor& weights, double eps, const Tensor& cos, const Tensor& sin, bool hadamard,
                   Tensor& storage, const Tensor& page_table, int64_t page_size, at::IntArrayRef spec) {
  const Tensor rows = contiguous_float(input, "compress_next: rows"), bias = contiguous_float(biases, "compress_next: bias");
  const Tensor norm = contiguous_float(weights, "compress_next: norm");
  const Pooling pooling(bias, overlap);
  const int64_t m = pooling.m, w = pooling.w, c = pooling.c, B = rows.size(0), S = rows.size(1);
  TORCH_CHECK_VALUE(kept.is_contiguous() && kept.scalar_type() == at::kFloat && kept.dim() == 3 && rows.dim() == 3 &&
                        kept.size(0) == B && kept.size(2) == 2 * w && rows.size(2) == 2 * w &&
                        kept.size(1) >= (overlap ? 2 * m - 1 : m - 1),
                    "compress_next: ring ", kept.sizes(), ", rows ", rows.sizes(), " and bias ", bias.sizes(),
                    " do not match");
  const WritablePages pages(storage, page_table, page_size, spec, B, "compress_next");
  TORCH_CHECK_VALUE(pages.layout.size() == c && norm.numel() == c && (!hadamard || (c & (c - 1)) == 0) &&
                        cos.dim() == 3 && 2 * cos.size(2) <= c,
                    "compress_next: norm ", norm.sizes(), " and angles ", cos.sizes(), " do not match ", c, " channels");
  const std::vector<int64_t> lengths = per_sequence(tokens, B, "compress_next: lengths");
  int64_t n = 0;
  for (const int64_t length : lengths) {
    n = std::max(n, (length + S) / m - length / m);
    TORCH_CHECK_VALUE((length + S) / m <= pages.capacity(), "compress_next: ", (length + S) / m, " entries do not fit ",
                      page_table.size(1), " pages");
  }
  TORCH_CHECK_VALUE(n <= cos.size(1), "compress_next: ", n, " entries and angles ", cos.sizes(), " do not match");
  const Angles angles(cos, sin, B, cos.size(1));
  const float *ring = kept.const_data_ptr<float>(), *x = rows.const_data_ptr<float>();
  const float* gains = norm.const_data_ptr<float>();
  const int64_t capacity = kept.size(1);
  parallel_ranges(B * n, 16 * m * c, [&](int64_t begin, int64_t end) {
    std::vector<float> peak(c), total(c), entry(c);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / n, length = lengths[b], block = length / m + item % n;
      if ((block + 1) * m > length + S) continue;
      auto row_at = [&](int64_t i) {
        const int64_t p = block * m + i;
        return p < length ? ring + (b * capacity + p % capacity) * 2 * w : x + (b * S + p - length) * 2 * w;
      };
      pooling.pool(row_at, block > 0, peak, total, entry.data());
      normalize_row(entry.data(), c, gains, static_cast<float>(eps), entry.data());
      angles.rotate(b * cos.size(1) + item % n, entry.data(), c, false, entry.data());
      if (hadamard) hadamard_row(entry.data(), c);
      pages.pack(b, block, entry.data());
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("compress(Tensor rows, Tensor bias, bool overlap, bool has_previous) -> Tensor");
  m.def(
      "compress_next(Tensor ring, Tensor rows, Tensor bias, Tensor lengths, bool overlap, Tensor norm, float eps, Tensor cos, "
      "Tensor sin, bool hadamard, Tensor(a!) storage, Tensor page_table, int page_size, int[] layout) -> ()");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("compress", compress);
  m.impl("compress_next", compress_next);
}

}  // namespace fiftyfold

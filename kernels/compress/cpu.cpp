// Gated pooling of neighboring tokens.
#include "../native/common.h"

namespace fiftyfold {
namespace {

// rows float32 [B, n * m, 2w] (values and gates), bias float32 [m, w], added to the gates. Without overlap, w = c and an
// entry pools its own m rows. With overlap, w = 2c: channels [c:] belong to the block of the row, channels [:c] to the
// next block. With `has_previous`, the first block has no entry. Returns float32 [B, n or n - 1, c].
Tensor compress(const Tensor& input, const Tensor& biases, bool overlap, bool has_previous) {
  const Tensor rows = contiguous_float(input, "compress: rows"), bias = contiguous_float(biases, "compress: bias");
  const int64_t m = bias.size(0), w = bias.size(1), c = overlap ? w / 2 : w, B = rows.size(0), n = rows.size(1) / m;
  TORCH_CHECK_VALUE(rows.dim() == 3 && rows.size(2) == 2 * w && n * m == rows.size(1) && n >= has_previous,
                    "compress: rows ", rows.sizes(), " and bias ", bias.sizes(), " do not match");
  const int64_t made = n - has_previous;
  Tensor out = at::empty({B, made, c}, rows.options());
  const float *x = rows.const_data_ptr<float>(), *a = bias.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, B * made, std::max<int64_t>(1, kGrain / (16 * m * c)), [&](int64_t begin, int64_t end) {
    std::vector<float> peak(c), total(c);
    for (int64_t entry = begin; entry < end; ++entry) {
      const int64_t b = entry / made, block = entry % made + has_previous;
      float* result = to + entry * c;
      std::fill(peak.begin(), peak.end(), -INFINITY);
      std::fill(total.begin(), total.end(), 0.0f);
      std::fill(result, result + c, 0.0f);
      // Visit the pooled rows: m of the preceding block with channels [:c], then m of the own block with channels [c:].
      const int64_t before = overlap && block > 0 ? m : 0;
      auto each = [&](auto use) {
        for (int64_t i = -before; i < m; ++i) {
          const int64_t place = i < 0 ? i + m : i, channel = overlap && i >= 0 ? c : 0;
          const float* row = x + ((b * n + block) * m + i) * 2 * w + channel;
          use(row, row + w, a + place * w + channel);
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
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("compress(Tensor rows, Tensor bias, bool overlap, bool has_previous) -> Tensor");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("compress", compress); }

}  // namespace fiftyfold

// Sampling of one token per row. Sorts only as many tokens as top_k, top_p and min_p keep.
#include "../native/common.h"

#include <numeric>

namespace fiftyfold {
namespace {

// exp(x) for x <= 0 with an error of a few units in the last place, without branches: 2^n times a Taylor polynomial on
// [-ln(2) / 2, ln(2) / 2]. 0 below -708.
inline double exp_of_negative(double x) {
  constexpr double kShift = 0x1.8p52;  // rounds to an integer, which lands in the low bits
  const double shifted = std::max(x, -708.0) * 1.4426950408889634 + kShift, n = shifted - kShift;
  const double r = (std::max(x, -708.0) - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, 8);
  return x < -708.0 ? 0.0 : p * scale;
}

struct Settings {
  double uniform, temperature, top_p, min_p;
  int64_t top_k;
};

// Return the share `uniform` of the total. It is below the total, so that the token found has a positive probability.
double target_of(double uniform, double total) { return std::min(uniform * total, std::nextafter(total, 0.0)); }

// Return the index of the first weight at which the running sum exceeds the share `uniform` of the total.
int64_t draw(const double* weights, int64_t V, double uniform) {
  double total = 0, sum = 0;
  for (int64_t i = 0; i < V; ++i) total += weights[i];
  const double target = target_of(uniform, total);
  for (int64_t i = 0; i < V; ++i) {
    sum += weights[i];
    if (sum > target) return i;
  }
  return V - 1;
}

// Like draw, but among the tokens that top_k, top_p and min_p keep, in descending order of weight. `order` [V] is scratch
// space.
int64_t draw_truncated(const double* weights, int64_t V, const Settings& s, int64_t* order) {
  const int64_t most = s.top_k > 0 ? std::min(s.top_k, V) : V;
  const auto likelier = [&](int64_t a, int64_t b) {
    return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
  };
  std::iota(order, order + V, 0);
  int64_t sorted = 0;
  const auto sort_to = [&](int64_t n) {
    n = std::min(n, V);
    std::partial_sort(order + sorted, order + n, order + V, likelier);
    sorted = n;
  };
  double mass = 0;
  if (most < V) {
    sort_to(most);
    for (int64_t i = 0; i < most; ++i) mass += weights[order[i]];
  } else {
    for (int64_t i = 0; i < V; ++i) mass += weights[i];
  }
  std::vector<double> cumulative;
  double sum = 0;
  for (int64_t rank = 0; rank < most; ++rank) {
    if (rank == sorted) sort_to(std::max<int64_t>(64, 8 * sorted));
    const double weight = weights[order[rank]];
    const bool within = (sum < s.top_p * mass || s.top_p >= 1) && weight >= s.min_p * weights[order[0]];
    if (rank && !within) break;
    cumulative.push_back(sum += weight);
  }
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), target_of(s.uniform, sum));
  return order[std::min<int64_t>(found - cumulative.begin(), cumulative.size() - 1)];
}

// Return one token ID per row of logits, float32 [B, V]; -1 for a row without a finite largest logit or with NaN.
std::vector<int64_t> sample(const Tensor& all_logits, at::ArrayRef<double> uniform, at::ArrayRef<double> temperature,
                            at::IntArrayRef top_k, at::ArrayRef<double> top_p, at::ArrayRef<double> min_p) {
  const Tensor logits = contiguous_float(all_logits, "sample: logits");
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "sample: expected logits [B, V], found ", logits.sizes());
  const int64_t B = logits.size(0), V = logits.size(1);
  for (const size_t found : {uniform.size(), temperature.size(), top_k.size(), top_p.size(), min_p.size()}) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(found) == B, "sample: ", found, " values for ", B, " rows");
  }
  std::vector<int64_t> tokens(B);
  const float* all = logits.const_data_ptr<float>();
  parallel_rows(B, 16 * V, [&](int64_t row) {
    const float* z = all + row * V;
    float best = -INFINITY;
    int32_t invalid = 0;
#pragma omp simd reduction(max : best) reduction(| : invalid)
    for (int64_t i = 0; i < V; ++i) {
      best = std::max(best, z[i]);
      invalid |= z[i] != z[i];
    }
    if (invalid || !std::isfinite(best)) {
      tokens[row] = -1;
      return;
    }
    const Settings s{uniform[row], temperature[row], top_p[row], min_p[row], top_k[row]};
    if (s.temperature <= 0) {
      tokens[row] = std::find(z, z + V, best) - z;
      return;
    }
    std::vector<double> weights(V);
    double* w = weights.data();
#pragma omp simd
    for (int64_t i = 0; i < V; ++i) w[i] = exp_of_negative((static_cast<double>(z[i]) - best) / s.temperature);
    if (s.top_p >= 1 && s.min_p <= 0 && (s.top_k <= 0 || s.top_k >= V)) {
      tokens[row] = draw(w, V, s.uniform);
    } else {
      std::vector<int64_t> order(V);
      tokens[row] = draw_truncated(w, V, s, order.data());
    }
  });
  return tokens;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def("sample(Tensor logits, float[] uniform, float[] temperature, int[] top_k, float[] top_p, float[] min_p) "
        "-> int[]");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("sample", sample); }

}  // namespace fiftyfold

// Experts of few tokens. Time is bound by reading the weights of the chosen experts.
#include "../native/common.h"
#include "../native/fp4.h"

namespace fiftyfold {
namespace {

// Tokens that share the loads of a weight row. Their sums must fit the registers.
#if defined(__AVX512F__)
constexpr int kTogether = 8;
#else
constexpr int kTogether = 4;
#endif

// Call f with `count`, from 1 to T, as a constant.
template <int T = kTogether, typename F>
inline void with_constant(int count, F f) {
  if constexpr (T > 1) {
    if (count < T) return with_constant<T - 1>(count, f);
  }
  f(std::integral_constant<int, T>{});
}

struct Pick {
  int64_t expert, token;
  float gain;
};

// Up to kTogether picks of one expert: picks[begin], ..., picks[begin + count - 1].
struct Group {
  int64_t begin;
  int count;
};

// Return the groups of picks, which are sorted by expert.
std::vector<Group> groups_of(const std::vector<Pick>& picks) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < static_cast<int64_t>(picks.size()); ++i) {
    const bool joins = !groups.empty() && groups.back().count < kTogether && picks[i - 1].expert == picks[i].expert;
    if (joins) {
      ++groups.back().count;
    } else {
      groups.push_back({i, 1});
    }
  }
  return groups;
}

// The next two classes hold weight matrices and share two methods: `dots` multiplies a row by `count` vectors, in the order of
// elements that `arranged` gives them.

// Matrices of float32 or BF16 elements.
template <typename W>
struct PlainMatrices {
  const W* data;
  int64_t columns;

  static const float* arranged(const float* x, int64_t, int64_t, std::vector<float>&) { return x; }
  void dots(const float* const* x, int count, int64_t row, float* out) const {
    const W* w = data + row * columns;
    if (count == 1) {
      out[0] = streamed_dot(x[0], w, columns);
    } else {
      with_constant(count, [&](auto constant) { shared_dots<constant.value>(x, w, out); });
    }
  }
  template <int T>
  void shared_dots(const float* const* x, const W* w, float* out) const {
    Floats sums[T];
    unrolled<T>([&](auto t) { sums[t] = Floats{}; });
    int64_t i = 0;
    for (; i + 16 <= columns; i += 16) {
      const Floats row = load16(w + i);
      unrolled<T>([&](auto t) { sums[t] += load16(x[t] + i) * row; });
    }
    unrolled<T>([&](auto t) {
      out[t] = sum_of(sums[t]);
      for (int64_t j = i; j < columns; ++j) out[t] += x[t][j] * widen(w[j]);
    });
  }
};

// Matrices of packed FP4 rows.
struct PackedMatrices {
  const uint8_t* data;
  int64_t columns, row_bytes;

  static const float* arranged(const float* x, int64_t rows, int64_t columns, std::vector<float>& out) {
    out.resize(rows * columns);
    for (int64_t r = 0; r < rows; ++r) separate_even_odd(x + r * columns, columns, out.data() + r * columns);
    return out.data();
  }
  void dots(const float* const* x, int count, int64_t row, float* out) const {
    const uint8_t* packed = data + row * row_bytes;
    with_constant(count, [&](auto constant) { packed_dots<constant.value>(x, packed, columns, out); });
  }
};

// Add the weighted outputs of the chosen experts to `out`, [tokens, d].
template <typename M>
void run_experts(const float* x, int64_t tokens, const std::vector<Pick>& picks, M w1, M w3, M w2, float limit, float* out) {
  const int64_t count = static_cast<int64_t>(picks.size()), inner = w2.columns, d = w1.columns;
  std::vector<float> middle(count * inner), arranged_x, arranged_middle;
  const float* inputs = M::arranged(x, tokens, d, arranged_x);
  const std::vector<Group> groups = groups_of(picks);
  parallel_rows(static_cast<int64_t>(groups.size()) * inner, 2 * d * kTogether, [&](int64_t i) {
    const Group group = groups[i / inner];
    const float* from[kTogether];
    for (int t = 0; t < group.count; ++t) from[t] = inputs + picks[group.begin + t].token * d;
    const int64_t column = i % inner, row = picks[group.begin].expert * inner + column;
    float gate[kTogether], up[kTogether];
    w1.dots(from, group.count, row, gate);
    w3.dots(from, group.count, row, up);
    for (int t = 0; t < group.count; ++t) {
      const int64_t p = group.begin + t;
      middle[p * inner + column] = picks[p].gain * swiglu_of(gate[t], up[t], limit);
    }
  });
  const float* hidden = M::arranged(middle.data(), count, inner, arranged_middle);
  parallel_rows(d, inner * count, [&](int64_t column) {
    for (const Group& group : groups) {
      const float* from[kTogether];
      for (int t = 0; t < group.count; ++t) from[t] = hidden + (group.begin + t) * inner;
      float sums[kTogether];
      w2.dots(from, group.count, picks[group.begin].expert * d + column, sums);
      for (int t = 0; t < group.count; ++t) out[picks[group.begin + t].token * d + column] += sums[t];
    }
  });
}

// w1 and w3 [inner, d] and w2 [d, inner] of one expert, or stacked for several: float32, BF16, or FP4 rows packed as in
// the cache (uint8, with bytes in the last dim).
struct Stack {
  const Tensor &w1, &w3, &w2;

  bool packed() const { return w1.scalar_type() == at::kByte; }
  static int64_t packed_bytes(int64_t n) { return Layout({n, kFp4, 0, kBf16}).nbytes(); }

  void check(const Tensor& x) const {
    const int64_t d = x.size(-1), inner = w1.size(-2);
    const bool packs = !packed() || (d % kFp4Block == 0 && inner % kFp4Block == 0);
    TORCH_CHECK_VALUE(packs && w1.size(-1) == (packed() ? packed_bytes(d) : d) && w1.sizes() == w3.sizes() &&
                          w2.dim() == w1.dim() && w2.size(-2) == d &&
                          w2.size(-1) == (packed() ? packed_bytes(inner) : inner) &&
                          w1.is_contiguous() && w3.is_contiguous() && w2.is_contiguous() &&
                          (w1.dim() == 2 || w2.size(0) == w1.size(0)) && w1.scalar_type() == w2.scalar_type() &&
                          w1.scalar_type() == w3.scalar_type(),
                      "fused_experts: x ", x.sizes(), " and w1 ", w1.sizes(), " do not match");
  }

  void add(const Tensor& x, const std::vector<Pick>& picks, float limit, float* out) const {
    const int64_t inner = w1.size(-2), d = x.size(-1);
    auto run = [&](auto matrices) {
      run_experts(x.const_data_ptr<float>(), rows_of(x), picks, matrices(w1, d), matrices(w3, d), matrices(w2, inner),
                  limit, out);
    };
    if (packed()) {
      run([](const Tensor& w, int64_t n) { return PackedMatrices{w.const_data_ptr<uint8_t>(), n, w.size(-1)}; });
    } else if (w1.scalar_type() == at::kFloat) {
      run([](const Tensor& w, int64_t n) { return PlainMatrices<float>{w.const_data_ptr<float>(), n}; });
    } else {
      run([](const Tensor& w, int64_t n) {
        return PlainMatrices<uint16_t>{reinterpret_cast<const uint16_t*>(w.const_data_ptr<BFloat16>()), n};
      });
    }
  }
};

// x float32 [..., d], chosen int64 [..., K], weights float32 [..., K], and the stacks of routed experts. `shared` is empty,
// or w1, w3 and w2 of an expert that every token uses with weight 1. Returns float32 [..., d].
Tensor fused_experts(const Tensor& input, const Tensor& chosen, const Tensor& weights, const Tensor& w1, const Tensor& w3,
               const Tensor& w2, at::TensorList shared, double limit) {
  const Tensor x = contiguous_float(input, "fused_experts: x");
  const int64_t E = w1.size(0), K = chosen.size(-1), N = rows_of(x);
  TORCH_CHECK_VALUE(chosen.numel() == N * K && weights.numel() == N * K && (shared.empty() || shared.size() == 3),
                    "fused_experts: x ", x.sizes(), " and chosen ", chosen.sizes(), " do not match");
  const Tensor ids = chosen.contiguous(), gains = contiguous_float(weights, "fused_experts: weights");
  const auto* id = ids.const_data_ptr<int64_t>();
  const float* gain = gains.const_data_ptr<float>();
  std::vector<Pick> picks;
  picks.reserve(N * K);
  for (int64_t i = 0; i < N * K; ++i) {
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < E, "fused_experts: expert ", id[i], " of ", E);
    picks.push_back({id[i], i / K, gain[i]});
  }
  std::stable_sort(picks.begin(), picks.end(), [](const Pick& a, const Pick& b) { return a.expert < b.expert; });
  Tensor out = at::empty_like(x);
  float* to = out.mutable_data_ptr<float>();
  std::memset(to, 0, out.nbytes());
  const Stack routed{w1, w3, w2};
  routed.check(x);
  routed.add(x, picks, static_cast<float>(limit), to);
  if (!shared.empty()) {
    const Stack all{shared[0], shared[1], shared[2]};
    all.check(x);
    picks.clear();
    for (int64_t t = 0; t < N; ++t) picks.push_back({0, t, 1.0f});
    all.add(x, picks, static_cast<float>(limit), to);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def(
      "fused_experts(Tensor x, Tensor chosen, Tensor weights, Tensor w1, Tensor w3, Tensor w2, Tensor[] shared, "
      "float limit) -> Tensor");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) { m.impl("fused_experts", fused_experts); }

}  // namespace fiftyfold

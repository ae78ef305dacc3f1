// Manifold-constrained hyper-connections, forward and backward. Every pass reads the streams of a token once.
//
// Weights are computed for kLanes tokens at a time, one per vector lane, because a 4 x 4 matrix does not fill a vector.
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "../native/rows.h"

namespace fiftyfold {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kMaxStreams = 8;
constexpr int64_t kColumns = 256;  // columns of fn that fit into the first-level cache along with a tile of tokens

using Lane = Floats;
static_assert(sizeof(Lane) == kLanes * sizeof(float));

struct Shape {
  int64_t tokens, n, d, weights;
  int64_t width() const { return n * d; }
};

Shape shape_of(const Tensor& streams, const Tensor& fn) {
  TORCH_CHECK_VALUE(streams.scalar_type() == at::kFloat && streams.dim() == 4 && streams.is_contiguous() &&
                        streams.size(2) <= kMaxStreams && fn.size(-1) == streams.size(2) * streams.size(3),
                    "hyper_connections: streams ", streams.sizes(), " and fn ", fn.sizes(), " do not match");
  TORCH_CHECK_VALUE(fn.is_contiguous(), "hyper_connections: expected a contiguous fn");
  return {streams.size(0) * streams.size(1), streams.size(2), streams.size(3), fn.size(0)};
}

// --- mixing weights of kLanes tokens
//
// A matrix [n, n] is an array of n * n vectors, in row-major order. The template argument N is n if the compiler knows it,
// else 0.

// Return a vector whose lane l is f(l). The values pass through an array, because compilers do not vectorize loops over the
// elements of a vector type.
template <typename F>
inline Lane lanes_of(F f) {
  float values[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) values[l] = f(l);
  return load16(values);
}

// Replace every element x of a vector by f(x).
template <typename F>
inline void each_lane(Lane& lane, F f) {
  float values[kLanes];
  store(lane, values);
  lane = lanes_of([&](int64_t l) { return f(values[l]); });
}

// Divide the elements of a matrix by the sum of their column (kOverRows: the sum runs over dim 0) or of their row (dim 1).
// Store the inverse sums, [n].
template <int64_t N, bool kOverRows>
inline void divide_by_sums(Lane* matrix, int64_t streams, float eps, Lane* inverse) {
  const int64_t n = N ? N : streams, step = kOverRows ? n : 1, line = kOverRows ? 1 : n;
  for (int64_t i = 0; i < n; ++i) {
    Lane sum = Lane{} + eps;
    for (int64_t j = 0; j < n; ++j) sum += matrix[i * line + j * step];
    inverse[i] = 1.0f / sum;
    for (int64_t j = 0; j < n; ++j) matrix[i * line + j * step] *= inverse[i];
  }
}

inline void softmax_rows(Lane* matrix, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    Lane *row = matrix + i * n, peak = row[0], sum = {};
    for (int64_t j = 1; j < n; ++j) peak = larger_of(row[j], peak);
    for (int64_t j = 0; j < n; ++j) {
      row[j] -= peak;
      each_lane(row[j], exp_of);
      sum += row[j];
    }
    for (int64_t j = 0; j < n; ++j) row[j] /= sum;
  }
}

// Replace logits by their Sinkhorn normalization: a softmax over rows, then half-steps that divide by column sums and by row
// sums in turn. The first and the last half-step divide by column sums.
template <int64_t N>
void sinkhorn(Lane* matrix, int64_t streams, int64_t iterations, float eps) {
  const int64_t n = N ? N : streams;
  Lane own[N ? N * N : kMaxStreams * kMaxStreams], inverse[kMaxStreams];
  softmax_rows(matrix, n);
  for (int64_t i = 0; i < n * n; ++i) own[i] = matrix[i] + eps;
  divide_by_sums<N, true>(own, n, eps, inverse);
  for (int64_t i = 1; i < iterations; ++i) {
    divide_by_sums<N, false>(own, n, eps, inverse);
    divide_by_sums<N, true>(own, n, eps, inverse);
  }
  for (int64_t i = 0; i < n * n; ++i) matrix[i] = own[i];
}

// Replace the gradient of a half-step's result by the gradient of its input.
template <int64_t N, bool kOverRows>
inline void divide_by_sums_backward(Lane* grad, const Lane* result, int64_t streams, const Lane* inverse) {
  const int64_t n = N ? N : streams, step = kOverRows ? n : 1, line = kOverRows ? 1 : n;
  for (int64_t i = 0; i < n; ++i) {
    Lane inner = {};
    for (int64_t j = 0; j < n; ++j) inner += grad[i * line + j * step] * result[i * line + j * step];
    for (int64_t j = 0; j < n; ++j) grad[i * line + j * step] = (grad[i * line + j * step] - inner) * inverse[i];
  }
}

// Replace the gradient of sinkhorn's result by the gradient of its logits. Half-steps are computed again.
template <int64_t N>
void sinkhorn_backward(const Lane* logits, Lane* grad, int64_t streams, int64_t iterations, float eps,
                       std::vector<Lane>& memory) {
  const int64_t n = N ? N : streams, halves = 2 * iterations - 1, size = n * n;
  memory.resize((halves + 1) * (size + n));
  Lane *kept = memory.data(), *inverse = kept + (halves + 1) * size;  // the softmax, then the result of every half-step
  std::copy(logits, logits + size, kept);
  softmax_rows(kept, n);
  Lane own[N ? N * N : kMaxStreams * kMaxStreams];
  for (int64_t i = 0; i < size; ++i) own[i] = kept[i] + eps;
  for (int64_t h = 0; h < halves; ++h) {
    if (h % 2 == 0) {
      divide_by_sums<N, true>(own, n, eps, inverse + h * n);
    } else {
      divide_by_sums<N, false>(own, n, eps, inverse + h * n);
    }
    for (int64_t i = 0; i < size; ++i) kept[(h + 1) * size + i] = own[i];
  }
  for (int64_t i = 0; i < size; ++i) own[i] = grad[i];
  for (int64_t h = halves; h-- > 0;) {
    if (h % 2 == 0) {
      divide_by_sums_backward<N, true>(own, kept + (h + 1) * size, n, inverse + h * n);
    } else {
      divide_by_sums_backward<N, false>(own, kept + (h + 1) * size, n, inverse + h * n);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    Lane inner = {};
    for (int64_t j = 0; j < n; ++j) inner += own[i * n + j] * kept[i * n + j];
    for (int64_t j = 0; j < n; ++j) grad[i * n + j] = (own[i * n + j] - inner) * kept[i * n + j];
  }
}

// Index of the scale of weight w: pre, post or comb.
inline int64_t kind_of(int64_t w, int64_t n) { return w < n ? 0 : (w < 2 * n ? 1 : 2); }

// Logits [weights] of `count` tokens starting at `first`: raw / rms * scale + base.
void logits_of(const float* raw, const float* inverse_rms, const float* scale, const float* base, const Shape& s,
               int64_t first, int64_t count, Lane* logits) {
  for (int64_t w = 0; w < s.weights; ++w) {
    const float gain = scale[kind_of(w, s.n)];
    logits[w] = lanes_of([&](int64_t l) {
      const int64_t t = first + std::min(l, count - 1);
      return raw[t * s.weights + w] * inverse_rms[t] * gain + base[w];
    });
  }
}

// Product of fn with the concatenated streams of every token, raw [tokens, weights], and the inverse root mean square of the
// streams, [tokens]. Callers fill it tile by tile, so that the streams of a tile are in the cache when they are collapsed.
struct NormalizedProduct {
  Tensor raw, inverse_rms;
  const float *streams, *fn;
  float *product, *rms;
  float eps;
  Shape s;

  NormalizedProduct(const Tensor& streams, const Tensor& fn, const Shape& shape, double norm_eps)
      : raw(at::empty({shape.tokens, shape.weights}, streams.options())),
        inverse_rms(at::empty({shape.tokens}, streams.options())), streams(streams.const_data_ptr<float>()),
        fn(fn.const_data_ptr<float>()), product(raw.mutable_data_ptr<float>()),
        rms(inverse_rms.mutable_data_ptr<float>()), eps(static_cast<float>(norm_eps)), s(shape) {}

  void fill(int64_t first, int64_t count) const {
    const int64_t D = s.width();
    for (int64_t t = first; t < first + count; ++t) {
      rms[t] = 1.0f / std::sqrt(sum_of_squares(streams + t * D, D) / static_cast<float>(D) + eps);
    }
    auto* tile = const_cast<float*>(streams + first * D);  // only read
    multiply_rows({tile, count, D}, fn, D, 0, s.weights, {product + first * s.weights, count, s.weights});
  }
};

// Write the weighted sum of one token's streams, [d]. Its weights are in lane `lane` of `pre`.
void collapse(const float* streams, const Lane* pre, int64_t lane, const Shape& s, float* out) {
  const float first = pre[0][lane];
  for (int64_t i = 0; i < s.d; ++i) out[i] = first * streams[i];
  for (int64_t j = 1; j < s.n; ++j) {
    const float weight = pre[j][lane];
    const float* stream = streams + j * s.d;
    for (int64_t i = 0; i < s.d; ++i) out[i] += weight * stream[i];
  }
}

int64_t tiles_of(const Shape& s) { return (s.tokens + kLanes - 1) / kLanes; }

// Return the input of a block [B, S, d], post [B, S, n], comb [B, S, n, n] and, for the backward pass, the raw product
// [tokens, 2n + n * n] and the inverse root mean square [tokens].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hc_pre(const Tensor& streams, const Tensor& fn, const Tensor& scale,
                                                         const Tensor& base, int64_t iterations, double eps,
                                                         double norm_eps) {
  const Shape s = shape_of(streams, fn);
  TORCH_CHECK_VALUE(s.weights == 2 * s.n + s.n * s.n, "hyper_connections: fn has ", s.weights, " rows");
  const NormalizedProduct normalized(streams, fn, s, norm_eps);
  const int64_t B = streams.size(0), S = streams.size(1);
  Tensor x = at::empty({B, S, s.d}, streams.options()), post = at::empty({B, S, s.n}, streams.options());
  Tensor comb = at::empty({B, S, s.n, s.n}, streams.options());
  const float *gains = scale.const_data_ptr<float>(), *biases = base.const_data_ptr<float>();
  const float* from = streams.const_data_ptr<float>();
  float *to = x.mutable_data_ptr<float>(), *posts = post.mutable_data_ptr<float>(), *combs = comb.mutable_data_ptr<float>();
  const float small = static_cast<float>(eps);
  parallel_rows(tiles_of(s), kLanes * (s.weights * s.width() + 2000), [&](int64_t tile) {
    const int64_t first = tile * kLanes, count = std::min(kLanes, s.tokens - first);
    Lane weights[2 * kMaxStreams + kMaxStreams * kMaxStreams];
    normalized.fill(first, count);
    logits_of(normalized.product, normalized.rms, gains, biases, s, first, count, weights);
    for (int64_t w = 0; w < s.n; ++w) each_lane(weights[w], [&](float x) { return sigmoid(x) + small; });
    for (int64_t w = s.n; w < 2 * s.n; ++w) each_lane(weights[w], [](float x) { return 2.0f * sigmoid(x); });
    (s.n == 4 ? sinkhorn<4> : sinkhorn<0>)(weights + 2 * s.n, s.n, iterations, small);
    for (int64_t l = 0; l < count; ++l) {
      const int64_t t = first + l;
      for (int64_t w = 0; w < s.n; ++w) posts[t * s.n + w] = weights[s.n + w][l];
      for (int64_t w = 0; w < s.n * s.n; ++w) combs[t * s.n * s.n + w] = weights[2 * s.n + w][l];
      collapse(from + t * s.width(), weights, l, s, to + t * s.d);
    }
  });
  return {x, post, comb, normalized.raw, normalized.inverse_rms};
}

// Collapse streams [B, S, n, d] to [B, S, d], with weights from fn [n, n * d], scale [1] and base [n].
Tensor hc_head(const Tensor& streams, const Tensor& fn, const Tensor& scale, const Tensor& base, double eps,
               double norm_eps) {
  const Shape s = shape_of(streams, fn);
  TORCH_CHECK_VALUE(s.weights == s.n, "hyper_connections: fn of the head has ", s.weights, " rows");
  const NormalizedProduct normalized(streams, fn, s, norm_eps);
  Tensor x = at::empty({streams.size(0), streams.size(1), s.d}, streams.options());
  const float *gains = scale.const_data_ptr<float>(), *biases = base.const_data_ptr<float>();
  const float* from = streams.const_data_ptr<float>();
  float* to = x.mutable_data_ptr<float>();
  parallel_rows(tiles_of(s), kLanes * s.weights * s.width(), [&](int64_t tile) {
    const int64_t first = tile * kLanes, count = std::min(kLanes, s.tokens - first);
    Lane weights[kMaxStreams];
    normalized.fill(first, count);
    logits_of(normalized.product, normalized.rms, gains, biases, s, first, count, weights);
    for (int64_t w = 0; w < s.n; ++w) {
      each_lane(weights[w], [&](float x) { return sigmoid(x) + static_cast<float>(eps); });
    }
    for (int64_t l = 0; l < count; ++l) collapse(from + (first + l) * s.width(), weights, l, s, to + (first + l) * s.d);
  });
  return x;
}

// to[t, c] += sum of g[t, w] * f[w, c] over w, for T tokens and V vectors of columns.
template <int T, int V>
[[gnu::noinline]] void add_product_block(const float* g, const float* f, const Shape& s, float* to) {
  const int64_t D = s.width();
  Floats sums[T * V];
  unrolled<T>([&](auto t) {
    unrolled<V>([&](auto v) { sums[t * V + v] = load16(to + t * D + 16 * v); });
  });
  for (int64_t w = 0; w < s.weights; ++w) {
    Floats columns[V];
    unrolled<V>([&](auto v) { columns[v] = load16(f + w * D + 16 * v); });
    unrolled<T>([&](auto t) {
      unrolled<V>([&](auto v) { sums[t * V + v] += g[t * s.weights + w] * columns[v]; });
    });
  }
  unrolled<T>([&](auto t) {
    unrolled<V>([&](auto v) { store(sums[t * V + v], to + t * D + 16 * v); });
  });
}

// to[t, c] += sum of g[t, w] * f[w, c] over w, for `count` tokens and the columns [begin, end).
void add_products(const float* g, const float* f, const Shape& s, int64_t count, int64_t begin, int64_t end, float* to) {
  const int64_t D = s.width();
  int64_t c = begin;
  for (; c + 16 * kRowBlock <= end; c += 16 * kRowBlock) {
    int64_t t = 0;
    for (; t + kTokenBlock <= count; t += kTokenBlock) {
      add_product_block<kTokenBlock, kRowBlock>(g + t * s.weights, f + c, s, to + t * D + c);
    }
    for (; t < count; ++t) add_product_block<1, kRowBlock>(g + t * s.weights, f + c, s, to + t * D + c);
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t w = 0; w < s.weights; ++w) {
      for (int64_t i = c; i < end; ++i) to[t * D + i] += g[t * s.weights + w] * f[w * D + i];
    }
  }
}

// Return the gradients of streams, fn, scale and base. Given are those of x [B, S, d], post and comb, and `later`
// [B, S, n, d], the gradient of later uses of the streams, if there are any.
std::tuple<Tensor, Tensor, Tensor, Tensor> hc_pre_backward(
    const Tensor& grad_x, const Tensor& grad_post, const Tensor& grad_comb, const std::optional<Tensor>& later,
    const Tensor& streams, const Tensor& fn, const Tensor& scale, const Tensor& base, const Tensor& raw,
    const Tensor& inverse_rms, int64_t iterations, double eps) {
  const Shape s = shape_of(streams, fn);
  const int64_t n = s.n, D = s.width(), tiles = tiles_of(s);
  Tensor grad_streams = at::empty_like(streams), grad_raw = at::empty_like(raw);
  // One row per tile, summed in order at the end: the sums do not depend on the number of threads.
  Tensor partial = at::zeros({tiles, s.weights + 3}, streams.options());
  const float *product = raw.const_data_ptr<float>(), *rms = inverse_rms.const_data_ptr<float>();
  const float *gains = scale.const_data_ptr<float>(), *biases = base.const_data_ptr<float>();
  const float *x = streams.const_data_ptr<float>(), *f = fn.const_data_ptr<float>(), *gx = grad_x.const_data_ptr<float>();
  const float *gpost = grad_post.const_data_ptr<float>(), *gcomb = grad_comb.const_data_ptr<float>();
  const float* after = later ? later->const_data_ptr<float>() : nullptr;
  float *out = grad_streams.mutable_data_ptr<float>(), *graw = grad_raw.mutable_data_ptr<float>();
  float* sums = partial.mutable_data_ptr<float>();
  const float small = static_cast<float>(eps);
  parallel_ranges(tiles, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<Lane> memory;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kLanes, count = std::min(kLanes, s.tokens - first);
      Lane logits[2 * kMaxStreams + kMaxStreams * kMaxStreams], grad[2 * kMaxStreams + kMaxStreams * kMaxStreams];
      Lane pre[kMaxStreams];
      logits_of(product, rms, gains, biases, s, first, count, logits);
      auto token = [&](int64_t l) { return first + std::min(l, count - 1); };
      for (int64_t j = 0; j < n; ++j) {
        grad[j] = lanes_of([&](int64_t l) { return dot(gx + token(l) * s.d, x + token(l) * D + j * s.d, s.d); });
        grad[n + j] = lanes_of([&](int64_t l) { return gpost[token(l) * n + j]; });
      }
      for (int64_t j = 0; j < n * n; ++j) grad[2 * n + j] = lanes_of([&](int64_t l) { return gcomb[token(l) * n * n + j]; });
      for (int64_t w = 0; w < 2 * n; ++w) {
        Lane gate = logits[w];
        each_lane(gate, sigmoid);
        if (w < n) pre[w] = gate + small;
        grad[w] *= (w < n ? 1.0f : 2.0f) * gate * (1.0f - gate);
      }
      (n == 4 ? sinkhorn_backward<4> : sinkhorn_backward<0>)(logits + 2 * n, grad + 2 * n, n, iterations, small, memory);
      float* own = sums + tile * (s.weights + 3);
      float through_norm[kLanes] = {};
      for (int64_t w = 0; w < s.weights; ++w) {
        const int64_t kind = kind_of(w, n);
        float upstream[kLanes];
        store(grad[w], upstream);
        for (int64_t l = 0; l < count; ++l) {
          const int64_t t = first + l;
          const float value = product[t * s.weights + w];
          own[w] += upstream[l];
          own[s.weights + kind] += upstream[l] * value * rms[t];
          const float scaled = upstream[l] * gains[kind];
          through_norm[l] += scaled * value;
          graw[t * s.weights + w] = scaled * rms[t];
        }
      }
      for (int64_t column = 0; column < D; column += kColumns) {
        for (int64_t l = 0; l < count; ++l) {
          const int64_t t = first + l;
          const float shrink = -through_norm[l] * rms[t] * rms[t] * rms[t] / static_cast<float>(D);
          // A range of columns may span several streams.
          for (int64_t c = column; c < std::min(D, column + kColumns);) {
            const int64_t j = c / s.d, stop = std::min({D, column + kColumns, (j + 1) * s.d});
            const float weight = pre[j][l];
            const float *own_x = x + t * D, *own_g = gx + t * s.d - j * s.d;
            float* to = out + t * D;
            for (int64_t i = c; i < stop; ++i) to[i] = shrink * own_x[i] + weight * own_g[i];
            if (after) {
              for (int64_t i = c; i < stop; ++i) to[i] += after[t * D + i];
            }
            c = stop;
          }
        }
        add_products(graw + first * s.weights, f, s, count, column, std::min(D, column + kColumns), out + first * D);
      }
    }
  });
  const Tensor totals = partial.sum(0);
  const Tensor grad_fn = at::mm(grad_raw.t(), streams.view({s.tokens, D}));
  return {grad_streams, grad_fn, totals.slice(0, s.weights), totals.slice(0, 0, s.weights)};
}

// out[k] = sum_j comb[j, k] * streams[j] + post[k] * output, for one token; output is float32 or BF16 [d].
template <int64_t N, typename T>
void post_token(const float* x, const float* comb, const float* post, const T* output, int64_t n, int64_t d, float* out) {
  const int64_t count = N ? N : n;
  for (int64_t k = 0; k < count; ++k) {
    float* to = out + k * d;
    if constexpr (N == 4) {
      const float c0 = comb[k], c1 = comb[4 + k], c2 = comb[8 + k], c3 = comb[12 + k], p = post[k];
      const float *x0 = x, *x1 = x + d, *x2 = x + 2 * d, *x3 = x + 3 * d;
      for (int64_t i = 0; i < d; ++i) to[i] = c0 * x0[i] + c1 * x1[i] + c2 * x2[i] + c3 * x3[i] + p * widen(output[i]);
    } else {
      for (int64_t i = 0; i < d; ++i) to[i] = post[k] * widen(output[i]);
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = 0; i < d; ++i) to[i] += comb[j * count + k] * x[j * d + i];
      }
    }
  }
}

template <typename T>
void post_all(const Tensor& streams, const Tensor& comb, const Tensor& post, const T* output, Tensor& out) {
  const int64_t n = streams.size(2), d = streams.size(3), tokens = streams.size(0) * streams.size(1);
  const float *x = streams.const_data_ptr<float>(), *c = comb.const_data_ptr<float>(), *p = post.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  parallel_rows(tokens, 4 * n * d, [&](int64_t t) {
    auto run = n == 4 ? post_token<4, T> : post_token<0, T>;
    run(x + t * n * d, c + t * n * n, p + t * n, output + t * d, n, d, to + t * n * d);
  });
}

void check_post(const Tensor& streams, const Tensor& comb, const Tensor& post, const Tensor& output) {
  const int64_t n = streams.size(2), tokens = streams.size(0) * streams.size(1);
  TORCH_CHECK_VALUE(streams.is_contiguous() && comb.is_contiguous() && post.is_contiguous() && output.is_contiguous() &&
                        comb.numel() == tokens * n * n && post.numel() == tokens * n &&
                        output.numel() == tokens * streams.size(3) &&
                        (output.scalar_type() == at::kFloat || output.scalar_type() == at::kBFloat16),
                    "hyper_connections: streams ", streams.sizes(), " and output ", output.sizes(), " do not match");
}

Tensor hc_post(const Tensor& streams, const Tensor& comb, const Tensor& post, const Tensor& output) {
  check_post(streams, comb, post, output);
  Tensor out = at::empty_like(streams);
  if (output.scalar_type() == at::kFloat) {
    post_all(streams, comb, post, output.const_data_ptr<float>(), out);
  } else {
    post_all(streams, comb, post, reinterpret_cast<const uint16_t*>(output.const_data_ptr<BFloat16>()), out);
  }
  return out;
}

template <int64_t N, typename T>
void post_token_backward(const float* g, const float* x, const float* comb, const float* post, const T* output, int64_t n,
                         int64_t d, float* grad_x, float* grad_comb, float* grad_post, float* grad_output) {
  const int64_t count = N ? N : n;
  for (int64_t j = 0; j < count; ++j) {
    const float* row = x + j * d;
    float* to = grad_x + j * d;
    if constexpr (N == 4) {
      const float c0 = comb[4 * j], c1 = comb[4 * j + 1], c2 = comb[4 * j + 2], c3 = comb[4 * j + 3];
      const float *g0 = g, *g1 = g + d, *g2 = g + 2 * d, *g3 = g + 3 * d;
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t i = 0; i < d; ++i) {
        s0 += row[i] * g0[i], s1 += row[i] * g1[i], s2 += row[i] * g2[i], s3 += row[i] * g3[i];
        to[i] = c0 * g0[i] + c1 * g1[i] + c2 * g2[i] + c3 * g3[i];
      }
      grad_comb[4 * j] = s0, grad_comb[4 * j + 1] = s1, grad_comb[4 * j + 2] = s2, grad_comb[4 * j + 3] = s3;
    } else {
      for (int64_t i = 0; i < d; ++i) to[i] = 0;
      for (int64_t k = 0; k < count; ++k) {
        grad_comb[j * count + k] = dot(row, g + k * d, d);
        for (int64_t i = 0; i < d; ++i) to[i] += comb[j * count + k] * g[k * d + i];
      }
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    const float weight = post[k];
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; ++i) {
      sum += g[k * d + i] * widen(output[i]);
      grad_output[i] = (k ? grad_output[i] : 0.0f) + weight * g[k * d + i];
    }
    grad_post[k] = sum;
  }
}

template <typename T>
void post_all_backward(const Tensor& grad, const Tensor& streams, const Tensor& comb, const Tensor& post, const T* output,
                       Tensor& grad_streams, Tensor& grad_comb, Tensor& grad_post, Tensor& grad_output) {
  const int64_t n = streams.size(2), d = streams.size(3), tokens = streams.size(0) * streams.size(1);
  const float *g = grad.const_data_ptr<float>(), *x = streams.const_data_ptr<float>();
  const float *c = comb.const_data_ptr<float>(), *p = post.const_data_ptr<float>();
  float *gs = grad_streams.mutable_data_ptr<float>(), *gc = grad_comb.mutable_data_ptr<float>();
  float *gp = grad_post.mutable_data_ptr<float>(), *go = grad_output.mutable_data_ptr<float>();
  parallel_rows(tokens, 10 * n * d, [&](int64_t t) {
    auto run = n == 4 ? post_token_backward<4, T> : post_token_backward<0, T>;
    run(g + t * n * d, x + t * n * d, c + t * n * n, p + t * n, output + t * d, n, d, gs + t * n * d, gc + t * n * n,
        gp + t * n, go + t * d);
  });
}

// Return the gradients of streams, comb, post and output, all float32.
std::tuple<Tensor, Tensor, Tensor, Tensor> hc_post_backward(const Tensor& upstream, const Tensor& streams,
                                                            const Tensor& comb, const Tensor& post,
                                                            const Tensor& output) {
  check_post(streams, comb, post, output);
  const Tensor grad = contiguous_float(upstream, "hyper_connections: grad");
  Tensor grad_streams = at::empty_like(streams), grad_comb = at::empty_like(comb), grad_post = at::empty_like(post);
  Tensor grad_output = at::empty(output.sizes(), streams.options());
  if (output.scalar_type() == at::kFloat) {
    post_all_backward(grad, streams, comb, post, output.const_data_ptr<float>(), grad_streams, grad_comb, grad_post,
                      grad_output);
  } else {
    post_all_backward(grad, streams, comb, post, reinterpret_cast<const uint16_t*>(output.const_data_ptr<BFloat16>()),
                      grad_streams, grad_comb, grad_post, grad_output);
  }
  return {grad_streams, grad_comb, grad_post, grad_output};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fiftyfold, m) {
  m.def(
      "hc_pre(Tensor streams, Tensor fn, Tensor scale, Tensor base, int iterations, float eps, float norm_eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "hc_pre_backward(Tensor grad_x, Tensor grad_post, Tensor grad_comb, Tensor? later, Tensor streams, Tensor fn, "
      "Tensor scale, Tensor base, Tensor raw, Tensor inverse_rms, int iterations, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("hc_head(Tensor streams, Tensor fn, Tensor scale, Tensor base, float eps, float norm_eps) -> Tensor");
  m.def("hc_post(Tensor streams, Tensor comb, Tensor post, Tensor output) -> Tensor");
  m.def(
      "hc_post_backward(Tensor grad, Tensor streams, Tensor comb, Tensor post, Tensor output) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fiftyfold, CPU, m) {
  m.impl("hc_pre", hc_pre);
  m.impl("hc_pre_backward", hc_pre_backward);
  m.impl("hc_head", hc_head);
  m.impl("hc_post", hc_post);
  m.impl("hc_post_backward", hc_post_backward);
}

}  // namespace fiftyfold

// What decoding on a CPU spends its time in: products of a matrix with a few rows, one token's attention to many
// positions, RoPE, GELU, the recurrence of a ContextBlock. A weight, a key or a value is read once, in float32 or
// bfloat16; the arithmetic is float32.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

using torch::stable::Tensor;
using bfloat16 = uint16_t;

#if defined __AVX512F__
constexpr int64_t WIDTH = 16;  // float32 numbers in a register
#else
constexpr int64_t WIDTH = 8;
#endif
constexpr int64_t ROWS = 8;         // rows that share one pass over a matrix, queries that share one over the keys
constexpr int64_t POSITIONS = 128;  // of a block of keys and values, which stays in the processor's cache meanwhile

typedef float Floats __attribute__((vector_size(4 * WIDTH)));

static Floats load(const float *from) {
    Floats floats;
    memcpy(&floats, from, sizeof floats);
    return floats;
}

static Floats load(const bfloat16 *from) {  // the upper halves of float32 numbers
#if defined __AVX512F__
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#elif defined __AVX2__
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#else
    uint32_t words[WIDTH];
    for (int64_t i = 0; i < WIDTH; i++) words[i] = uint32_t(from[i]) << 16;
    return load((const float *)words);
#endif
}

static float widen(float number) { return number; }
static float widen(bfloat16 number) { return std::bit_cast<float>(uint32_t(number) << 16); }

typedef int32_t Places __attribute__((vector_size(4 * WIDTH)));

// the sums of neighbours, first a's, then b's
static Floats add_neighbours(Floats a, Floats b) {
    Places even, odd;
    for (int i = 0; i < WIDTH; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// sums of the numbers in each of M registers, as the first M numbers of one: their neighbours' sums, WIDTH times halved
template <int M, int LEFT = WIDTH>
static inline __attribute__((always_inline)) Floats total(const Floats *sums) {
    if constexpr (LEFT == 1) return sums[0];
    Floats halved[(M + 1) / 2];
#pragma GCC unroll 8
    for (int i = 0; i < (M + 1) / 2; i++) halved[i] = add_neighbours(sums[2 * i], sums[std::min(2 * i + 1, M - 1)]);
    if constexpr (LEFT > 1) return total<(M + 1) / 2, LEFT / 2>(halved);
}

// sums that run side by side for each of M rows, so that an addition need not wait for the one before it
constexpr int chains(int M) { return std::max(1, int(ROWS) / M); }

// y_m = x_m w for M rows x (M, K)
template <int M, typename T>
static inline __attribute__((always_inline)) void dot(const float *x, const T *w, int64_t K, float *y) {
    constexpr int CHAINS = chains(M);
    Floats sums[CHAINS][M] = {};
    int64_t k = 0;
    for (; k + CHAINS * WIDTH <= K; k += CHAINS * WIDTH)
        for (int c = 0; c < CHAINS; c++) {
            if (sizeof(T) == 2 && CHAINS >= 4 && c % 4 == 0) __builtin_prefetch(w + k + c * WIDTH + 512);  // 1 KB ahead
            Floats weights = load(w + k + c * WIDTH);
            for (int m = 0; m < M; m++) sums[c][m] += weights * load(x + m * K + k + c * WIDTH);
        }
    for (; k + WIDTH <= K; k += WIDTH)
        for (int m = 0; m < M; m++) sums[0][m] += load(w + k) * load(x + m * K + k);
    for (int c = 1; c < CHAINS; c++)
        for (int m = 0; m < M; m++) sums[0][m] += sums[c][m];
    Floats totals = total<M>(sums[0]);
    for (int m = 0; m < M; m++) y[m] = totals[m];
    for (; k < K; k++)
        for (int m = 0; m < M; m++) y[m] += x[m * K + k] * widen(w[k]);
}

// out_m += sum_j p_mj v_j for M rows p (M, POSITIONS) and n values v, in WIDTH * CHAINS of the D columns of v and out
template <int M, int CHAINS, typename T>
static void add(const float *p, const T *v, int64_t stride, int64_t n, int64_t D, float *out) {
    Floats sums[M][CHAINS];
    for (int m = 0; m < M; m++)
        for (int c = 0; c < CHAINS; c++) sums[m][c] = load(out + m * D + c * WIDTH);
    for (int64_t j = 0; j < n; j++)
        for (int c = 0; c < CHAINS; c++) {
            Floats value = load(v + j * stride + c * WIDTH);
            for (int m = 0; m < M; m++) sums[m][c] += p[m * POSITIONS + j] * value;
        }
    for (int m = 0; m < M; m++)
        for (int c = 0; c < CHAINS; c++) memcpy(out + m * D + c * WIDTH, &sums[m][c], sizeof(Floats));
}

// f(M, m) for rows m to m + M of all, M at most ROWS, as a constant
template <typename F>
static void by_rows(int64_t all, F f) {
    for (int64_t m = 0; m < all; m += ROWS) switch (std::min(ROWS, all - m)) {
        case 1: f(std::integral_constant<int, 1>(), m); break;
        case 2: f(std::integral_constant<int, 2>(), m); break;
        case 3: f(std::integral_constant<int, 3>(), m); break;
        case 4: f(std::integral_constant<int, 4>(), m); break;
        case 5: f(std::integral_constant<int, 5>(), m); break;
        case 6: f(std::integral_constant<int, 6>(), m); break;
        case 7: f(std::integral_constant<int, 7>(), m); break;
        default: f(std::integral_constant<int, 8>(), m);
    }
}

template <typename T>
static void multiply(const Tensor &x, const Tensor &W, const float *b, Tensor &y) {
    int64_t N = W.size(0), K = W.size(1), stride = W.stride(0);
    auto rows = (const float *)x.data_ptr();
    auto weights = (const T *)W.data_ptr();
    auto out = (float *)y.data_ptr();
    int64_t block = std::max<int64_t>(1, (1 << 16) / K);  // rows of W for which another thread is worth waking
    std::atomic<int64_t> next = 0;  // each block goes to the thread that is free: none waits for one that was held up
    torch::stable::parallel_for(0, N, block, [&](int64_t, int64_t) {
        for (int64_t begin; (begin = next.fetch_add(block)) < N;)
            by_rows(x.numel() / K, [&](auto M, int64_t m) {
                float dots[M];
                for (int64_t n = begin; n < std::min(N, begin + block); n++) {
                    dot<M>(rows + m * K, weights + n * stride, K, dots);
                    for (int i = 0; i < M; i++) out[(m + i) * N + n] = dots[i] + (b ? b[n] : 0);
                }
            });
    });
}

// x (..., K) W^T + b -> (..., N)
static Tensor linear(Tensor x, Tensor W, std::optional<Tensor> b) {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = W.size(0);
    Tensor y = torch::stable::new_empty(x, shape);
    auto bias = b ? (const float *)b->data_ptr() : nullptr;
    (W.element_size() == 4 ? multiply<float> : multiply<bfloat16>)(x, W, bias, y);
    return y;
}

// softmax(scores) v after some blocks of positions: largest score, sum of exp(score - largest), the same with v
struct Softmax {
    float *largest, *total, *out;
};

// M queries q (M, D) go on from positions begin to end of k (P, D), v (P, Dv) and bias (M, P)
template <typename T>
static void attend_part(int64_t M, const float *q, int64_t D, const T *k, int64_t k_stride, const T *v,
                        int64_t v_stride, int64_t Dv, const float *bias, int64_t bias_stride, int64_t begin,
                        int64_t end, Softmax state) {
    std::vector<float> p(M * POSITIONS);
    for (int64_t at = begin; at < end; at += POSITIONS) {
        int64_t n = std::min(POSITIONS, end - at);
        by_rows(M, [&](auto rows, int64_t m) {
            float dots[rows];
            for (int64_t j = 0; j < n; j++) {
                dot<rows>(q + m * D, k + (at + j) * k_stride, D, dots);
                for (int i = 0; i < rows; i++) p[(m + i) * POSITIONS + j] = dots[i];
            }
        });
        for (int64_t m = 0; m < M; m++) {
            float *scores = &p[m * POSITIONS], largest = state.largest[m], total = 0;
            if (bias)
                for (int64_t j = 0; j < n; j++) scores[j] += bias[m * bias_stride + at + j];
            for (int64_t j = 0; j < n; j++) largest = std::max(largest, scores[j]);
            for (int64_t j = 0; j < n; j++) total += scores[j] = std::exp(scores[j] - largest);
            float fade = std::exp(state.largest[m] - largest);
            for (int64_t d = 0; d < Dv; d++) state.out[m * Dv + d] *= fade;
            state.total[m] = state.total[m] * fade + total;
            state.largest[m] = largest;
        }
        by_rows(M, [&](auto rows, int64_t m) {
            constexpr int CHAINS = chains(rows);
            const T *values = v + at * v_stride;
            float *weights = &p[m * POSITIONS], *out = state.out + m * Dv;
            int64_t d = 0;
            for (; d + CHAINS * WIDTH <= Dv; d += CHAINS * WIDTH)
                add<rows, CHAINS>(weights, values + d, v_stride, n, Dv, out + d);
            for (; d + WIDTH <= Dv; d += WIDTH) add<rows, 1>(weights, values + d, v_stride, n, Dv, out + d);
            for (; d < Dv; d++)
                for (int i = 0; i < rows; i++)
                    for (int64_t j = 0; j < n; j++)
                        out[i * Dv + d] += weights[i * POSITIONS + j] * widen(values[j * v_stride + d]);
        });
    }
}

template <typename T>
static void attend_all(const Tensor &q, const Tensor &k, const Tensor &v, double scale,
                       const std::optional<Tensor> &bias, Tensor &out) {
    int64_t B = q.size(0), H = q.size(1), D = q.size(3), G = k.size(1), P = k.size(2), Dv = v.size(3), M = H / G;
    std::vector<float> queries(B * H * D);
    auto unscaled = (const float *)q.data_ptr();
    for (int64_t row = 0, b_stride = q.stride(0), h_stride = q.stride(1); row < B * H; row++)
        for (int64_t d = 0; d < D; d++)
            queries[row * D + d] = scale * unscaled[row / H * b_stride + row % H * h_stride + d];
    // few keys' heads: their positions are shared out among the threads, and put together at the end
    int64_t threads = torch::stable::get_num_threads(), blocks = (P + POSITIONS - 1) / POSITIONS;
    int64_t parts = std::clamp<int64_t>((threads + B * G - 1) / (B * G), 1, blocks);
    std::vector<float> largest(B * H * parts, -FLT_MAX), total(B * H * parts), partial(B * H * parts * Dv);
    torch::stable::parallel_for(0, B * G * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            int64_t part = task % parts, g = task / parts % G, b = task / parts / G;
            Softmax state{&largest[task * M], &total[task * M], &partial[task * M * Dv]};
            auto keys = (const T *)k.data_ptr() + b * k.stride(0) + g * k.stride(1);
            auto values = (const T *)v.data_ptr() + b * v.stride(0) + g * v.stride(1);
            int64_t stride = bias ? bias->stride(1) : 0;
            auto biases = bias ? (const float *)bias->data_ptr() + b * bias->stride(0) + g * M * stride : nullptr;
            attend_part(M, &queries[(b * H + g * M) * D], D, keys, k.stride(2), values, v.stride(2), Dv, biases, stride,
                        P * part / parts, P * (part + 1) / parts, state);
        }
    });
    auto result = (float *)out.data_ptr();
    for (int64_t row = 0; row < B * H; row++) {
        float most = -FLT_MAX, sum = 0, *to = result + row * Dv;
        auto at = [&](int64_t part) { return (row / M * parts + part) * M + row % M; };
        for (int64_t part = 0; part < parts; part++) most = std::max(most, largest[at(part)]);
        std::fill(to, to + Dv, 0);
        for (int64_t part = 0; part < parts; part++) {
            float weight = std::exp(largest[at(part)] - most);
            sum += weight * total[at(part)];
            for (int64_t d = 0; d < Dv; d++) to[d] += weight * partial[at(part) * Dv + d];
        }
        for (int64_t d = 0; d < Dv; d++) to[d] /= sum;
    }
}

// softmax(scale q k^T + bias) v: q (B, H, 1, D), k (B, G, P, D), v (B, G, P, Dv), bias (B, H, P) -> (B, H, 1, Dv)
static Tensor attend(Tensor q, Tensor k, Tensor v, double scale, std::optional<Tensor> bias) {
    Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), 1, v.size(3)});
    (k.element_size() == 4 ? attend_all<float> : attend_all<bfloat16>)(q, k, v, scale, bias, out);
    return out;
}

// RoPE of x (B, H, T, D) at positions (T), its pairs turned by frequencies (R / 2) per position
static Tensor rotate(Tensor x, Tensor positions, Tensor frequencies) {
    int64_t B = x.size(0), H = x.size(1), T = x.size(2), D = x.size(3), half = frequencies.size(0);
    int64_t b_stride = x.stride(0), h_stride = x.stride(1), t_stride = x.stride(2);
    Tensor y = torch::stable::new_empty(x, {B, H, T, D});
    auto in = (const float *)x.data_ptr(), turns = (const float *)frequencies.data_ptr();
    auto place = (const int64_t *)positions.data_ptr();
    auto out = (float *)y.data_ptr();
    torch::stable::parallel_for(0, T, std::max<int64_t>(1, 1024 / (B * H)), [&](int64_t begin, int64_t end) {
        std::vector<float> c(half), s(half);
        for (int64_t t = begin; t < end; t++) {
            for (int64_t r = 0; r < half; r++) {
                float angle = float(place[t]) * turns[r];
                c[r] = std::cos(angle), s[r] = std::sin(angle);
            }
            for (int64_t row = 0; row < B * H; row++) {
                const float *from = in + row / H * b_stride + row % H * h_stride + t * t_stride;
                float *__restrict to = out + (row * T + t) * D;
                for (int64_t r = 0; r < half; r++) to[r] = from[r] * c[r] - from[r + half] * s[r];
                for (int64_t r = 0; r < half; r++) to[r + half] = from[r + half] * c[r] + from[r] * s[r];
                for (int64_t d = 2 * half; d < D; d++) to[d] = from[d];
            }
        }
    });
    return y;
}

static float gelu(float x) { return 0.5f * x * (1 + std::erf(x * float(M_SQRT1_2))); }

// of so few numbers that no other thread is worth waking
static Tensor gelu_few(Tensor x) {
    Tensor y = torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
    auto in = (const float *)x.data_ptr();
    float *__restrict out = (float *)y.data_ptr();
    int64_t n = x.numel();
    for (int64_t i = 0; i < n; i++) out[i] = gelu(in[i]);
    return y;
}

// c_t = LayerNorm(c_{t-1} + GELU(W c_{t-1} + half_t)), row by row: halves (B, T, E), c (B, E), W (E, E) -> (B, T, E)
static Tensor recurrence(Tensor halves, Tensor c, Tensor W, Tensor scale, Tensor shift, double eps) {
    int64_t B = halves.size(0), T = halves.size(1), E = halves.size(2), stride = W.stride(0);
    Tensor contexts = torch::stable::new_empty(halves, {B, T, E});
    auto in = (const float *)halves.data_ptr(), first = (const float *)c.data_ptr(), w = (const float *)W.data_ptr();
    auto gamma = (const float *)scale.data_ptr(), beta = (const float *)shift.data_ptr();
    auto out = (float *)contexts.data_ptr();
    torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; b++) {
            const float *before = first + b * E;
            for (int64_t t = 0; t < T; t++) {
                const float *half = in + (b * T + t) * E;
                float *__restrict now = out + (b * T + t) * E, mean = 0, variance = 0;
                for (int64_t e = 0; e < E; e++) dot<1>(before, w + e * stride, E, now + e);
                for (int64_t e = 0; e < E; e++) now[e] = before[e] + gelu(now[e] + half[e]);
                for (int64_t e = 0; e < E; e++) mean += now[e] / E;
                for (int64_t e = 0; e < E; e++) variance += (now[e] - mean) * (now[e] - mean) / E;
                float scale = 1 / std::sqrt(variance + float(eps));
                for (int64_t e = 0; e < E; e++) now[e] = (now[e] - mean) * scale * gamma[e] + beta[e];
                before = now;
            }
        }
    });
    return contexts;
}

STABLE_TORCH_LIBRARY(decode, m) {
    m.def("linear(Tensor x, Tensor W, Tensor? b) -> Tensor");
    m.def("attend(Tensor q, Tensor k, Tensor v, float scale, Tensor? bias) -> Tensor");
    m.def("rotate(Tensor x, Tensor positions, Tensor frequencies) -> Tensor");
    m.def("gelu(Tensor x) -> Tensor");
    m.def("recurrence(Tensor halves, Tensor c, Tensor W, Tensor scale, Tensor shift, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(decode, CPU, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("attend", TORCH_BOX(&attend));
    m.impl("rotate", TORCH_BOX(&rotate));
    m.impl("gelu", TORCH_BOX(&gelu_few));
    m.impl("recurrence", TORCH_BOX(&recurrence));
}

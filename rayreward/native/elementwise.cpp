// What stands between the products of a decoder's layer, each in one pass over memory, for CPUs.
// Called from native/__init__.py.
//
// A row's result depends, bit for bit, on that row alone: it is summed in one order, whatever the
// number of rows or threads. Everything is computed in float32 and rounded once.

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 15;  // elements
constexpr int64_t CHUNK = 256;              // elements that are widened at once
static_assert(CHUNK % LANES == 0);

inline void widen(const float* from, float* to, int64_t count) {
    std::memcpy(to, from, count * sizeof(float));
}
inline void widen(const BFloat16* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}
template <class T>
inline void narrow(const float* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

template <class T>
void normalize(const T* x, const T* weight, T* result, int64_t width, float epsilon) {
    alignas(64) float wide[CHUNK], factor[CHUNK];
    vec sums[4] = {};
    for (int64_t at = 0; at < width; at += CHUNK) {
        const int64_t count = std::min(CHUNK, width - at);
        std::fill(wide, wide + CHUNK, 0.0f);
        widen(x + at, wide, count);
        for (int64_t i = 0; i < CHUNK; i += 4 * LANES)
            for (int k = 0; k < 4 && i + k * LANES < CHUNK; ++k) {
                const vec value = load(wide + i + k * LANES);
                sums[k] += value * value;
            }
    }
    const vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float squares = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) squares += sum[lane];
    const float scale = 1.0f / std::sqrt(squares / float(width) + epsilon);
    for (int64_t at = 0; at < width; at += CHUNK) {
        const int64_t count = std::min(CHUNK, width - at);
        widen(x + at, wide, count);
        widen(weight + at, factor, count);
        for (int64_t i = 0; i < count; ++i) wide[i] = wide[i] * scale * factor[i];
        narrow(wide, result + at, count);
    }
}

template <class T>
void gate(const T* gates, const T* ups, T* result, int64_t count) {
    alignas(64) float x[CHUNK], up[CHUNK];
    std::fill(x, x + CHUNK, 0.0f);
    std::fill(up, up + CHUNK, 0.0f);
    widen(gates, x, count);
    widen(ups, up, count);
    for (int64_t i = 0; i < CHUNK; i += LANES) {
        const vec value = load(x + i);
        const vec away = exponential(value < 0.0f ? value : -value);
        const vec share = (value < 0.0f ? away : all(1.0f)) / (away + 1.0f);
        store(x + i, value * share * load(up + i));
    }
    narrow(x, result, count);
}

template <class T>
void rotate(const T* x, const T* cosine, const T* sine, T* result, int64_t depth) {
    const int64_t half = depth / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = widen(x[i]), high = widen(x[i + half]);
        narrow(low * widen(cosine[i]) - high * widen(sine[i]), result[i]);
        narrow(high * widen(cosine[i + half]) + low * widen(sine[i + half]), result[i + half]);
    }
}

template <class Work>
void each(int is_bfloat16, Work work) {
    if (is_bfloat16) work(BFloat16{}); else work(0.0f);
}

}  // namespace

// x and result (rows, width), weight (width), all dense: x / sqrt(mean(x²) + epsilon) · weight.
extern "C" void rayreward_rms_norm(int is_bfloat16, const void* x, const void* weight, void* result,
                                   int64_t rows, int64_t width, float epsilon, int threads) {
    each(is_bfloat16, [&](auto zero) {
        using T = decltype(zero);
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_THREADS)
        for (int64_t row = 0; row < rows; ++row)
            normalize(static_cast<const T*>(x) + row * width, static_cast<const T*>(weight),
                      static_cast<T*>(result) + row * width, width, epsilon);
    });
}

// gates, ups and result (count), dense: silu(gates) · ups. The result may be the gates.
extern "C" void rayreward_silu_times(int is_bfloat16, const void* gates, const void* ups,
                                     void* result, int64_t count, int threads) {
    each(is_bfloat16, [&](auto zero) {
        using T = decltype(zero);
#pragma omp parallel for num_threads(threads) if (count > WORTH_THREADS)
        for (int64_t at = 0; at < count; at += CHUNK)
            gate(static_cast<const T*>(gates) + at, static_cast<const T*>(ups) + at,
                 static_cast<T*>(result) + at, std::min(CHUNK, count - at));
    });
}

// x and result (places, heads, depth) with strides (place, head) and depth dense; cosine and sine
// (places, depth), dense: x · cosine + (-x₂, x₁) · sine, where x₁ and x₂ are the halves of depth.
extern "C" void rayreward_rotate(int is_bfloat16, const void* x, const void* cosine,
                                 const void* sine, void* result, const int64_t* strides,
                                 int64_t places, int64_t heads, int64_t depth, int threads) {
    each(is_bfloat16, [&](auto zero) {
        using T = decltype(zero);
#pragma omp parallel for num_threads(threads) if (places * heads * depth > WORTH_THREADS)
        for (int64_t place = 0; place < places; ++place)
            for (int64_t head = 0; head < heads; ++head)
                rotate(static_cast<const T*>(x) + place * strides[0] + head * strides[1],
                       static_cast<const T*>(cosine) + place * depth,
                       static_cast<const T*>(sine) + place * depth,
                       static_cast<T*>(result) + place * strides[2] + head * strides[3], depth);
    });
}

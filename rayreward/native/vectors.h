// Vectors as wide as the processor has them, e to the power of x, and bfloat16.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

inline vec load(const float* from) {
    vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }
inline vec all(float value) { return value - vec{}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// e to the power of x, within 2 units in the last place; 0 below -87, NaN for NaN.
inline vec exponential(vec x) {
    const vec magic = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    vec shifted = x * 1.44269504088896341f + magic;
    vec whole = shifted - magic;
    vec rest = x - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    vec sum = all(1.9875691500e-4f);
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    ivec power = ((ivec)shifted - (ivec)magic + 127) << 23;
    vec result = sum * (vec)power;
    return x < -87.0f ? vec{} : result;
}

inline vec capped(vec x, float cap) {  // cap · tanh(x / cap)
    vec away = exponential(x < 0.0f ? x * (2.0f / cap) : x * (-2.0f / cap));
    vec size = (1.0f - away) / (1.0f + away) * cap;
    return x < 0.0f ? -size : size;
}

struct BFloat16 {
    uint16_t bits;
};
inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, BFloat16& to) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) {
        to.bits = 0x7fc0;
    } else {
        to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
    }
}

}  // namespace

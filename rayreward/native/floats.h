// What kernels hold numbers in.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

template <class vec>
inline vec load(const float* from) {
    vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class vec>
inline void store(float* to, vec value) {
    std::memcpy(to, &value, sizeof value);
}

// As many floats, from an address on at which no `vec` lies across two lines of a cache.
template <class vec>
class Floats {
  public:
    explicit Floats(int64_t count)
        : vectors((count * sizeof(float) + sizeof(vec) - 1) / sizeof(vec)) {}
    float* data() { return reinterpret_cast<float*>(vectors.data()); }

  private:
    std::vector<vec> vectors;
};

// Sums of words by keys, of which hashes of weights are made. Called from hashing.py, which has the
// same in NumPy. Integers have no rounding: neither threads nor the order of summation move a bit.
//
// Keys come in halves, so that a processor multiplies them in one step: those without AVX-512 have
// no product of 64 bits for vectors.

#include "hash.h"

#include <algorithm>

namespace {

constexpr int LANES = 2;

inline uint64_t product(int32_t word, int32_t half) {
    return static_cast<uint64_t>(static_cast<int64_t>(word) * half);
}

}  // namespace

extern "C" void rayreward_hash(const int32_t* words, int64_t count, const int32_t* low,
                               const int32_t* high, int64_t chunk, uint64_t* sums, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t begin = 0; begin < count; begin += chunk) {
        uint64_t of_low[LANES] = {}, of_high[LANES] = {};
        const int64_t end = std::min(chunk, count - begin);
        for (int64_t i = 0; i < end; ++i)
            for (int lane = 0; lane < LANES; ++lane) {
                of_low[lane] += product(words[begin + i], low[lane * chunk + i]);
                of_high[lane] += product(words[begin + i], high[lane * chunk + i]);
            }
        for (int lane = 0; lane < LANES; ++lane)
            sums[begin / chunk * LANES + lane] = of_low[lane] + (of_high[lane] << 32);
    }
}

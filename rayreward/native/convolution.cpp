// Causal convolutions of each channel by itself, over a stream of texts, in float32. Called from
// recurrence.py.
//
// A result's bits go by the tokens before it in its text alone: each is summed in one order, with
// multiplication and addition rounded together.

#include "convolution.h"

#include <cmath>

extern "C" void rayreward_convolution(const float* rows, const float* weight, const float* bias,
                                      float* results, const int32_t* before, int64_t tokens,
                                      int64_t channels, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; ++t) {
        float* to = results + t * channels;
        for (int64_t c = 0; c < channels; ++c) to[c] = bias ? bias[c] : 0.0f;
        for (int64_t k = 0; k < size; ++k) {
            const int32_t place = before[t * size + k];
            if (place < 0) continue;
            const float *row = rows + place * channels, *by = weight + k * channels;
            for (int64_t c = 0; c < channels; ++c) to[c] = std::fma(by[c], row[c], to[c]);
        }
    }
}

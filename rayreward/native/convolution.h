// What the kernel for causal convolutions is called with.

#pragma once

#include <cstdint>

// results[t] (channels) is the bias, which may be null, and then, one after the other, the sums of
// weight[k] · rows[before[t][k]], for k from 0 to `size`; a negative place stands for zeros. Rows and
// results are (tokens, channels), the weight (size, channels), before (tokens, size). All are dense.
extern "C" void rayreward_convolution(const float* rows, const float* weight, const float* bias,
                                      float* results, const int32_t* before, int64_t tokens,
                                      int64_t channels, int64_t size, int threads);

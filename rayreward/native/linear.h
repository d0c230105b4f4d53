// What the kernel for linear layers is called with.

#pragma once

#include <cstdint>

// results (count, out) = rows (count, in) · weightᵀ + bias, where the weight (out, in) lies in panels
// of 16 of its rows, (out / 16, in, 16), and the bias (out) may be null. All are dense.
extern "C" void rayreward_linear(const float* rows, const float* panels, const float* bias,
                                 float* results, int64_t count, int64_t out, int64_t in,
                                 int threads);

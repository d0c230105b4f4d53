// What the kernel for linear layers is called with.

#pragma once

#include <cstdint>

// results (count, out) = rows (count, in) · weightᵀ + bias, where the weight (out, in) lies in panels
// of 16 of its rows, and the bias (out), in float32, may be null. All are dense. Rows and results are
// float32, or bfloat16 if the weight is, too. Panels are (out / 16, in, 16), in bfloat16 (out / 16, in,
// 8, 2): a panel's first eight rows and its last eight, one of each in turns.
extern "C" void rayreward_linear(int rows_are_bfloat16, int panels_are_bfloat16, const void* rows,
                                 const void* panels, const float* bias, void* results,
                                 int64_t count, int64_t out, int64_t in, int threads);

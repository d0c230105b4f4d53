// What the kernel for gated delta rules is called with.

#pragma once

#include <cstdint>

constexpr int32_t CONTINUED = -2, ZEROS = -1;

// The state of a head, (keys, values), begins as zeros, and becomes with each token t of a text
//
//     state · exp(decays[t]) + k ⊗ beta[t] · (values[t] − (state · exp(decays[t]))ᵀ k)
//
// of which results[t] is stateᵀ q. There k and q are queries[t] and keys[t], divided by their lengths
// where `normalize` says so, and q is multiplied by `scale`. Queries and keys are (T, key_heads,
// keys), values and results (T, value_heads, values), decays and betas (T, value_heads), all of them
// float32 and dense. As many value heads as there are to a key head share it, one after the other.
//
// `from` says what the state is before a token: CONTINUED is what the token before it left, ZEROS a
// text's beginning, and any other number a slot; `into` is the slot that the state is kept in
// afterwards, or negative. The shape is T, key_heads, value_heads, keys, values and how many slots
// there are.
extern "C" void rayreward_recurrence(const float* queries, const float* keys, const float* values,
                                     const float* decays, const float* betas, float* results,
                                     const int32_t* from, const int32_t* into,
                                     const int64_t* shape, int normalize, float scale,
                                     int threads);

// What the kernel for attention is called with.

#pragma once

#include <cstdint>

// How texts lie in a stream. Filled in by attention/compiled.py.
struct Layout {
    const int64_t* places;      // of the tokens of all texts, one text after the other
    const int64_t* lengths;     // of texts, in tokens
    const int64_t* owned_from;  // the first token of each text that is computed for it
    int64_t texts;
    int64_t owned;   // places from the first on that some text owns; what follows is set to 0
    int64_t causal;  // whether a token sees those before it only, or all of its text
    int64_t calls;   // of the kernel by this layout, so far
};

// Rotary embeddings: by what angles the halves of a head are turned against each other before they
// are multiplied, (T, D) each, of the type of the heads; null where they are not.
struct Angles {
    const void *cosines, *sines;
    int64_t cosines_place, sines_place;  // strides
};

// Shapes and strides are in elements: queries (T, heads, D), keys (T, kv_heads, D), values
// (T, kv_heads, E), results (T, heads, E); each row of D or E is dense.
extern "C" void rayreward_attention(
    int is_bfloat16, const void* queries, const void* keys, const void* values, void* results,
    const int64_t* strides,  // (place, head) of queries, keys, values, results
    int64_t tokens,
    int64_t kv_heads, int64_t heads,  // heads to each of the kv_heads
    int64_t depth, int64_t value_depth, const Angles* angles,
    const Layout* layout, float scale, float cap, int64_t window, int threads);

// What the kernel for hashes of weights is called with.

#pragma once

#include <cstdint>

// sums (chunks, 2) = of each chunk of the words, the sums of word · key modulo 2⁶⁴, one for each lane.
// A chunk is `chunk` words, the last one what is left. A key is low + 2³² · high, (2, chunk) each.
// All are signed and dense.
extern "C" void rayreward_hash(const int32_t* words, int64_t count, const int32_t* low,
                               const int32_t* high, int64_t chunk, uint64_t* sums, int threads);

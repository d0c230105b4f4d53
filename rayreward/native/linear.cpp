// Linear layers in float32, for CPUs with vectors of 8 floats. Called from panels.py and
// operators.cpp.
//
// A result is the bias, and then, one after the other, the sums over 256 of a row's columns each. So
// neither other rows, nor how rows and panels are shared out among threads, moves a bit.
//
// 6 rows by the 16 results of a panel are summed in registers at once. Some rows meet panel after
// panel, so few that they stay in a core's second cache, and many enough for a panel that comes from
// far to be worth its way (as in Goto and van de Geijn, 2008).

#include "linear.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr int LANES = 8, VECTORS = 2, PANEL = LANES * VECTORS;  // results
constexpr int ROWS = 6;             // with 2 vectors, 12 of 16 registers hold sums
constexpr int64_t SUMMED = 256;     // columns, before their sum is added to those of the others
constexpr int64_t DEPTH = 2048;     // columns that meet a panel before the next panel's turn comes
constexpr int64_t HELD = 3 << 12;   // floats of rows, about, that panel after panel meets: 48 KB
constexpr int64_t PIECES = 4;       // a thread, at least, so that all end at about the same time
constexpr int64_t AHEAD = 16;       // columns of a panel that are asked for before they are needed
static_assert(DEPTH % SUMMED == 0);

typedef float vec __attribute__((vector_size(4 * LANES)));

inline vec load(const float* from) {
    vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }

constexpr int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Part {  // of a product
    const float *rows, *panel, *start;  // start: bias, zeros, or the sums over the columns before
    float* results;
    int64_t in, out, apart;  // from row to row of rows, of results and of start
    int64_t columns;
};

// COUNT rows by one panel.
template <int COUNT>
inline void multiply(const Part& part) {
    const float* start = part.start;
    int64_t apart = part.apart;
    for (int64_t begin = 0; begin < part.columns; begin += SUMMED) {
        vec sums[COUNT][VECTORS] = {};
        const float *rows = part.rows + begin, *panel = part.panel + begin * PANEL;
        const int64_t in = part.in, columns = std::min(SUMMED, part.columns - begin);
        for (int64_t k = 0; k < columns; ++k) {
            __builtin_prefetch(panel + (k + AHEAD) * PANEL);
            const vec first = load(panel + k * PANEL), second = load(panel + k * PANEL + LANES);
#pragma GCC unroll 6
            for (int r = 0; r < COUNT; ++r) {
                const vec factor = rows[r * in + k] - vec{};
                sums[r][0] += factor * first;
                sums[r][1] += factor * second;
            }
        }
        for (int r = 0; r < COUNT; ++r)
            for (int v = 0; v < VECTORS; ++v)
                store(part.results + r * part.out + v * LANES,
                      load(start + r * apart + v * LANES) + sums[r][v]);
        start = part.results, apart = part.out;
    }
}

// The same for `count` of them, COUNT at most.
template <int COUNT>
inline void multiply_some(int64_t count, const Part& part) {
    if constexpr (COUNT > 1)
        if (count < COUNT) return multiply_some<COUNT - 1>(count, part);
    multiply<COUNT>(part);
}

}  // namespace

extern "C" void rayreward_linear(const float* rows, const float* panels, const float* bias,
                                 float* results, int64_t count, int64_t out, int64_t in,
                                 int threads) {
    if (!count) return;
    static const float zeros[PANEL] = {};
    const int64_t depth = std::min(in, DEPTH);
    const int64_t held = std::max<int64_t>(HELD / depth / ROWS, 1) * ROWS;
    const int64_t blocks = std::max<int64_t>(count / held, 1);
    const int64_t block = parts(parts(count, blocks), ROWS) * ROWS;  // rows, about as many in each
    const int64_t turns = std::min(parts(threads * PIECES, blocks), out / PANEL);
    const int64_t some = parts(out / PANEL, turns);  // panels
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t begin = 0; begin < count; begin += block)
        for (int64_t from = 0; from < out / PANEL; from += some) {
            const int64_t end = std::min(begin + block, count);
            for (int64_t k = 0; k < in; k += depth)
                for (int64_t p = from; p < std::min(from + some, out / PANEL); ++p) {
                    const float* first = bias ? bias + p * PANEL : zeros;
                    for (int64_t row = begin; row < end; row += ROWS) {
                        float* to = results + row * out + p * PANEL;
                        multiply_some<ROWS>(end - row,
                                            {rows + row * in + k, panels + (p * in + k) * PANEL,
                                             k ? to : first, to, in, out, k ? out : 0,
                                             std::min(depth, in - k)});
                    }
                }
        }
}

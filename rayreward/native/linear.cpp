// Linear layers in float32 and bfloat16, for CPUs with vectors of 8 floats. Called from panels.py and
// operators.cpp.
//
// A result is the bias, and then, one after the other, the sums over 256 of a row's columns each, in
// float32, rounded once. So neither other rows, nor how rows and panels are shared out among threads,
// moves a bit.
//
// 6 rows by the 16 results of a panel are summed in registers at once. Some rows meet panel after
// panel, so few that they stay in a core's second cache, and many enough for a panel that comes from
// far to be worth its way (as in Goto and van de Geijn, 2008). Rows in bfloat16 are widened before,
// once for all panels; a panel, which is met once for a few rows, as it is read.

#include "floats.h"
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

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
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_bits __attribute__((vector_size(2 * LANES)));

// The results of one of a panel's columns.
inline void load_column(const float* from, vec& first, vec& second) {
    first = load<vec>(from), second = load<vec>(from + LANES);
}
inline void load_column(const BFloat16* from, vec& first, vec& second) {  // one of each, in turns
    bits both;
    std::memcpy(&both, from, sizeof both);
    first = (vec)(both << 16), second = (vec)(both & 0xffff0000u);
}

// The results of a row, rounded as `narrow` does.
inline void narrow_panel(const float* from, BFloat16* to) {
    for (int v = 0; v < VECTORS; ++v) {
        const bits wide = (bits)load<vec>(from + v * LANES);
        const bits rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;  // ties to even
        const bits result = (wide & 0x7fffffff) > 0x7f800000 ? bits{} + 0x7fc0 : rounded;  // NaN
        const half_bits narrowed = __builtin_convertvector(result, half_bits);
        std::memcpy(to + v * LANES, &narrowed, sizeof narrowed);
    }
}

constexpr int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class W>
struct Part {  // of a product
    const float* rows;
    const W* panel;
    const float* start;  // bias, zeros, or the sums over the columns before
    float* results;
    int64_t in, out, apart;  // from row to row of rows, of results and of start
    int64_t columns;
};

// COUNT rows by one panel.
template <int COUNT, class W>
inline void multiply(const Part<W>& part) {
    const float* start = part.start;
    int64_t apart = part.apart;
    for (int64_t begin = 0; begin < part.columns; begin += SUMMED) {
        vec sums[COUNT][VECTORS] = {};
        const float* rows = part.rows + begin;
        const W* panel = part.panel + begin * PANEL;
        const int64_t in = part.in, columns = std::min(SUMMED, part.columns - begin);
        for (int64_t k = 0; k < columns; ++k) {
            __builtin_prefetch(panel + (k + AHEAD) * PANEL);
            vec first, second;
            load_column(panel + k * PANEL, first, second);
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
                      load<vec>(start + r * apart + v * LANES) + sums[r][v]);
        start = part.results, apart = part.out;
    }
}

// The same for `count` of them, COUNT at most.
template <int COUNT, class W>
inline void multiply_some(int64_t count, const Part<W>& part) {
    if constexpr (COUNT > 1)
        if (count < COUNT) return multiply_some<COUNT - 1>(count, part);
    multiply<COUNT>(part);
}

// T: rows and results; W: weight.
template <class T, class W>
void multiply_all(const T* rows, const W* panels, const float* bias, T* results, int64_t count,
                  int64_t out, int64_t in, int threads) {
    constexpr bool IS_WIDE = std::is_same_v<T, float>;
    static const float zeros[PANEL] = {};
    const int64_t depth = std::min(in, DEPTH);
    const int64_t held = std::max<int64_t>(HELD / depth / ROWS, 1) * ROWS;
    const int64_t blocks = std::max<int64_t>(count / held, 1);
    const int64_t block = parts(parts(count, blocks), ROWS) * ROWS;  // rows, about as many in each
    const int64_t turns = std::min(parts(threads * PIECES, blocks), out / PANEL);
    const int64_t some = parts(out / PANEL, turns);  // panels
    const int64_t waiting = in > depth ? some : 1;   // panels whose sums are not rounded yet
#pragma omp parallel num_threads(threads)
    {
        Floats<vec> widened(IS_WIDE ? 0 : block * depth);
        Floats<vec> sums(IS_WIDE ? 0 : waiting * block * PANEL);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t begin = 0; begin < count; begin += block)
            for (int64_t from = 0; from < out / PANEL; from += some) {
                const int64_t many = std::min(block, count - begin);
                for (int64_t k = 0; k < in; k += depth) {
                    const int64_t columns = std::min(depth, in - k);
                    Part<W> part{};
                    part.columns = columns;
                    const float* given = widened.data();
                    if constexpr (IS_WIDE) {
                        given = rows + begin * in + k, part.in = in, part.out = out;
                    } else {
                        part.in = columns, part.out = PANEL;
                        for (int64_t r = 0; r < many; ++r)
                            for (int64_t c = 0; c < columns; ++c)
                                widened.data()[r * columns + c] =
                                    widen(rows[(begin + r) * in + k + c]);
                    }
                    for (int64_t p = from; p < std::min(from + some, out / PANEL); ++p) {
                        T* to = results + begin * out + p * PANEL;
                        float* sum = sums.data() + (p - from) % waiting * block * PANEL;
                        if constexpr (IS_WIDE) sum = to;
                        part.panel = panels + (p * in + k) * PANEL;
                        part.apart = k ? part.out : 0;
                        for (int64_t row = 0; row < many; row += ROWS) {
                            part.rows = given + row * part.in;
                            part.results = sum + row * part.out;
                            part.start = k ? part.results : bias ? bias + p * PANEL : zeros;
                            multiply_some<ROWS>(many - row, part);
                        }
                        if constexpr (!IS_WIDE)
                            if (k + columns == in)
                                for (int64_t r = 0; r < many; ++r)
                                    narrow_panel(sum + r * PANEL, to + r * out);
                    }
                }
            }
    }
}

}  // namespace

extern "C" void rayreward_linear(int rows_are_bfloat16, int panels_are_bfloat16, const void* rows,
                                 const void* panels, const float* bias, void* results,
                                 int64_t count, int64_t out, int64_t in, int threads) {
    if (!count) return;
    const auto multiply = [&](auto of_rows, auto of_panels) {
        using T = decltype(of_rows);
        using W = decltype(of_panels);
        multiply_all(static_cast<const T*>(rows), static_cast<const W*>(panels), bias,
                     static_cast<T*>(results), count, out, in, threads);
    };
    if (rows_are_bfloat16)
        multiply(BFloat16{}, BFloat16{});
    else if (panels_are_bfloat16)
        multiply(float{}, BFloat16{});
    else
        multiply(float{}, float{});
}

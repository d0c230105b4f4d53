// Attention over a flat stream, for CPUs. Called from attention/compiled.py and operators.cpp.
//
// A token's result depends, bit for bit, on its own text up to where it sees, and on nothing else:
// scores are summed over D in one order; weights and values are summed key after key, in blocks
// that begin at multiples of BLOCK from the text's first token; what a query does not see adds an
// exact zero. So neither the rest of the batch, nor how a text is cut into tiles, nor the number of
// threads moves a bit.
//
// A row is a query of one head; the lanes of a vector are rows, so that whatever is taken over keys
// needs no shuffling. Everything is computed in float32. Online softmax as in FlashAttention (Dao
// et al., 2022).

#include "attention.h"
#include "floats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace {

// VECTORS of rows times STEP keys, or STEP columns of values, are summed in registers at once.
#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 3, STEP = 8;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 3, STEP = 4;  // 12 of 16
#else
constexpr int LANES = 4, VECTORS = 3, STEP = 8;  // 24 of 32 on ARM
#endif
constexpr int GROUP = LANES * VECTORS;   // rows
constexpr int BLOCK = 64;                // keys that are taken at once
constexpr int64_t MOST_GROUPS = 16;      // of a tile, which share copied keys
constexpr int64_t PIECES = 16;           // a thread, so that all end at about the same time
constexpr int64_t TURNS = 4;             // in which a thread takes its pieces, at least
constexpr float UNSEEN = -INFINITY, LOWEST = -1e30f;
static_assert(BLOCK % STEP == 0);

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

inline vec all(float value) { return value - vec{}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// Lanes of a and b, counted through.
template <int... FROM>
inline vec mixed(vec a, vec b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, FROM...);
#else
    return __builtin_shuffle(a, b, ivec{FROM...});
#endif
}

// Rows become lanes and lanes rows: squares of HALF by HALF change places, then smaller ones.
template <int HALF, int... LANE>
inline void transpose(vec (&rows)[LANES], std::integer_sequence<int, LANE...> lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
        if (!(i & HALF)) {
            vec a = rows[i], b = rows[i + HALF];
            rows[i] = mixed<(LANE & HALF ? LANES + LANE - HALF : LANE)...>(a, b);
            rows[i + HALF] = mixed<(LANE & HALF ? LANES + LANE : LANE + HALF)...>(a, b);
        }
    if constexpr (HALF > 1) transpose<HALF / 2>(rows, lanes);
}
inline void transpose(vec (&rows)[LANES]) {
    transpose<LANES / 2>(rows, std::make_integer_sequence<int, LANES>());
}

// e to the power of x, within 2 units in the last place; 0 below -87, NaN for NaN.
inline vec exponential(vec x) {
    const vec magic = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    vec shifted = x * 1.44269504088896341f + magic;
    vec whole = shifted - magic;
    vec rest = x - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    vec sum = all(1.9875691500e-4f);
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    ivec power = ((ivec)shifted - (ivec)magic + 127) << 23;
    vec result = sum * (vec)power;
    return x < -87.0f ? vec{} : result;
}

inline vec capped(vec x, float cap) {  // cap · tanh(x / cap)
    vec away = exponential(x < 0.0f ? x * (2.0f / cap) : x * (-2.0f / cap));
    vec size = (1.0f - away) / (1.0f + away) * cap;
    return x < 0.0f ? -size : size;
}

template <class T>
inline void narrowed(vec from, T* to, int64_t width) {  // `width` lanes
    float wide[LANES];
    T some[LANES];
    store(wide, from);
    for (int lane = 0; lane < LANES; ++lane) narrow(wide[lane], some[lane]);
    if (width == LANES)
        std::memcpy(to, some, sizeof some);
    else
        std::memcpy(to, some, width * sizeof *to);
}

template <class T>
struct Rows {  // (places, heads, D), D dense
    T* data;
    int64_t place, head;
    T* at(int64_t p, int64_t h) const { return data + p * place + h * head; }
};

// Of each place, to turn queries and keys by; none where null.
template <class T>
struct Turn {
    const T *cosines, *sines;
    int64_t cosines_place, sines_place;
};

// One head, its halves turned against each other.
template <class T>
inline void widen_turned(const T* head, const Turn<T>& turn, int64_t place, int64_t depth,
                         float* __restrict to) {
    if (!turn.cosines) {
        for (int64_t d = 0; d < depth; ++d) to[d] = widen(head[d]);
        return;
    }
    const T* cosines = turn.cosines + place * turn.cosines_place;
    const T* sines = turn.sines + place * turn.sines_place;
    const int64_t half = depth / 2;
    for (int64_t d = 0; d < half; ++d) {
        const float first = widen(head[d]), second = widen(head[d + half]);
        to[d] = first * widen(cosines[d]) - second * widen(sines[d]);
        to[d + half] = second * widen(cosines[d + half]) + first * widen(sines[d + half]);
    }
}

// Has a row of one head on its way before it is needed.
template <class T>
inline void fetch(const T* head, int64_t depth) {
    for (const char* line = reinterpret_cast<const char*>(head);
         line < reinterpret_cast<const char*>(head + depth); line += 64)
        __builtin_prefetch(line);
}

struct Score {
    float scale, cap;  // cap 0 for none
    int64_t window;    // 0 for all
    bool causal;
};

// sums += vectors · scalars over `count` in order, where vectors are (count, GROUP) and the scalars of
// sum i are `apart` from those of sum i + 1, each `next` from the one before.
template <int V>
inline void accumulate(vec (&sums)[STEP][V], const float* vectors, const float* scalars,
                       int64_t apart, int64_t next, int64_t count) {
    for (int64_t n = 0; n < count; ++n) {
        vec factor[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) factor[v] = load<vec>(vectors + n * GROUP + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < STEP; ++i) {
            vec scalar = all(scalars[i * apart + n * next]);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sums[i][v] += factor[v] * scalar;
        }
    }
}
template <int V>
inline void store_all(float* to, const vec (&sums)[STEP][V]) {  // (STEP, GROUP)
#pragma GCC unroll 16
    for (int i = 0; i < STEP; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(to + i * GROUP + v * LANES, sums[i][v]);
}

// Scores (STEP, GROUP) of V vectors of queries (depth, GROUP) for STEP keys (STEP, depth).
template <int V>
inline void multiply_keys(const float* queries, const float* keys, int64_t depth, float* scores) {
    vec sums[STEP][V] = {};
    accumulate<V>(sums, queries, keys, depth, 1, depth);
    store_all<V>(scores, sums);
}

// results = results · shrink + weights · values, over STEP columns and `count` keys: results (STEP,
// GROUP), weights (count, GROUP), values (count, width).
template <int V>
inline void add_values(const float* weights, const float* values, int64_t width, int64_t count,
                       const vec* shrink, float* results) {
    vec sums[STEP][V];
#pragma GCC unroll 16
    for (int c = 0; c < STEP; ++c)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
            sums[c][v] = load<vec>(results + c * GROUP + v * LANES) * shrink[v];
    accumulate<V>(sums, weights, values, 1, width, count);
    store_all<V>(results, sums);
}

constexpr int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

struct Tile {
    const int64_t* places;   // of its text's tokens
    int64_t length;          // of its text
    int64_t first, count;    // its queries, by position
};

struct Row {  // of a tile
    int64_t place, head;
};

// A tile's rows, group by group: queries (depth, GROUP) and results (width, GROUP). And one block
// of keys (BLOCK, depth) and values (BLOCK, width).
struct Scratch {
    int64_t depth, width;  // of queries and keys, and of values and results, filled up
    std::vector<Row> rows;
    Floats<vec> queries, results, keys, values, scores;
    std::vector<vec> most, sum;
    Scratch(int64_t count, int64_t depth, int64_t value_depth)
        : depth(up(depth, LANES)), width(up(value_depth, std::max(LANES, STEP))), rows(count),
          queries(up(count, GROUP) * this->depth), results(up(count, GROUP) * width),
          keys(BLOCK * this->depth), values(BLOCK * width), scores(BLOCK * GROUP),
          most(up(count, GROUP) / LANES), sum(up(count, GROUP) / LANES) {}
    float* queries_of(int64_t row) {
        return queries.data() + row / GROUP * GROUP * depth + row % GROUP;
    }
    float* results_of(int64_t row) {
        return results.data() + row / GROUP * GROUP * width + row % GROUP;
    }
};

// V vectors of rows, from `row` of the tile on, against the keys from `begin` to `end`.
template <int V>
void attend_rows(Scratch& scratch, const Tile& tile, int64_t heads, int64_t row, int64_t begin,
                 int64_t end, int64_t depth, const Score& score) {
    const int64_t count = end - begin;
    float* scores = scratch.scores.data();
    for (int64_t k = 0; k < count; k += STEP)
        multiply_keys<V>(scratch.queries_of(row), scratch.keys.data() + k * depth, depth,
                         scores + k * GROUP);
    const int64_t first = tile.first + row / heads;
    const int64_t last = tile.first + (row + V * LANES - 1) / heads;
    const bool edge =  // whether some row does not see all of them
        (score.causal && end > first + 1) ||
        (score.window && (begin + score.window <= last || first + score.window < end));
    vec shrink[V];
    for (int v = 0; v < V; ++v) {
        float* mine = scores + v * LANES;
        if (score.cap)
            for (int64_t k = 0; k < count; ++k)
                store(mine + k * GROUP, capped(load<vec>(mine + k * GROUP), score.cap));
        if (edge) {
            ivec from, to;  // the first and the last key that each row sees, from `begin`
            for (int lane = 0; lane < LANES; ++lane) {
                const int64_t at = tile.first + (row + v * LANES + lane) / heads - begin;
                const int64_t ahead = score.window ? at + score.window - 1 : BLOCK;
                from[lane] = score.window ? std::max<int64_t>(at - score.window + 1, 0) : 0;
                to[lane] = std::clamp<int64_t>(score.causal ? at : ahead, -1, BLOCK);
            }
            for (int64_t k = 0; k < count; ++k) {
                ivec key = int32_t(k) - ivec{};
                vec seen = key < from ? all(UNSEEN) : load<vec>(mine + k * GROUP);
                store(mine + k * GROUP, key > to ? all(UNSEEN) : seen);
            }
        }
        vec& most = scratch.most[row / LANES + v];
        vec now = most, sum{};
        for (int64_t k = 0; k < count; ++k) now = larger(load<vec>(mine + k * GROUP), now);
        for (int64_t k = 0; k < count; ++k) {
            vec weight = exponential(load<vec>(mine + k * GROUP) - now);
            store(mine + k * GROUP, weight);
            sum += weight;
        }
        shrink[v] = exponential(most - now);
        vec& total = scratch.sum[row / LANES + v];
        total = total * shrink[v] + sum;
        most = now;
    }
    for (int64_t column = 0; column < scratch.width; column += STEP)
        add_values<V>(scores, scratch.values.data() + column, scratch.width, count, shrink,
                      scratch.results_of(row) + column * GROUP);
}

// The same for `vectors` of them, V at most.
template <int V, class... More>
void attend_some(int64_t vectors, More&&... more) {
    if constexpr (V > 1)
        if (vectors < V) return attend_some<V - 1>(vectors, more...);
    attend_rows<V>(more...);
}

// Queries of a tile's first `count` rows, turned, scaled and with rows in lanes. Lanes and columns
// beyond them hold what was there before.
template <class T>
void read_queries(const Rows<const T>& queries, const Turn<T>& turn, int64_t count, int64_t depth,
                  float scale, Scratch& scratch) {
    float* wide = scratch.keys.data();  // (LANES, depth); keys come later
    for (int64_t row = 0; row < count; row += LANES) {
        for (int64_t r = row; r < std::min(row + LANES, count); ++r) {
            const auto [place, head] = scratch.rows[r];
            widen_turned(queries.at(place, head), turn, place, depth,
                         wide + (r - row) * scratch.depth);
        }
        for (int64_t r = row + LANES; r < std::min(row + 2 * LANES, count); ++r)
            fetch(queries.at(scratch.rows[r].place, scratch.rows[r].head), depth);
        for (int64_t column = 0; column < depth; column += LANES) {
            vec square[LANES];
            for (int r = 0; r < LANES; ++r) square[r] = load<vec>(wide + r * scratch.depth + column);
            transpose(square);
            float* to = scratch.queries_of(row) + column * GROUP;
            for (int d = 0; d < LANES; ++d) store(to + d * GROUP, square[d] * scale);
        }
    }
}

// Results of a tile's first `count` rows. Tells whether all are finite.
template <class T>
bool write_results(const Rows<T>& results, int64_t count, int64_t value_depth, Scratch& scratch) {
    ivec broken{};
    for (int64_t row = 0; row < count; row += LANES) {
        for (int64_t r = row + LANES; r < std::min(row + 2 * LANES, count); ++r)
            fetch(results.at(scratch.rows[r].place, scratch.rows[r].head), value_depth);
        const vec share = 1.0f / scratch.sum[row / LANES];
        for (int64_t column = 0; column < value_depth; column += LANES) {
            vec square[LANES];
            const float* from = scratch.results_of(row) + column * GROUP;
            for (int d = 0; d < LANES; ++d) square[d] = load<vec>(from + d * GROUP) * share;
            transpose(square);
            for (int64_t r = row; r < std::min(row + LANES, count); ++r) {
                const auto [place, head] = scratch.rows[r];
                const vec result = square[r - row];
                broken |= ~(result - result == 0.0f);
                narrowed(result, results.at(place, head) + column,
                         std::min<int64_t>(LANES, value_depth - column));
            }
        }
    }
    for (int lane = 0; lane < LANES; ++lane)
        if (broken[lane]) return false;
    return true;
}

// Tells whether all results are finite.
template <class T>
bool attend_tile(const Rows<const T>& queries, const Rows<const T>& keys,
                 const Rows<const T>& values, const Rows<T>& results, const Tile& tile,
                 const Turn<T>& turn, int64_t kv_head, int64_t heads, int64_t depth,
                 int64_t value_depth, const Score& score, Scratch& scratch) {
    int64_t rows = 0;
    for (int64_t position = tile.first; position < tile.first + tile.count; ++position)
        for (int64_t head = 0; head < heads; ++head)
            scratch.rows[rows++] = {tile.places[position], kv_head * heads + head};
    read_queries(queries, turn, rows, depth, score.scale, scratch);
    std::fill_n(scratch.results.data(), up(rows, GROUP) * scratch.width, 0.0f);
    std::fill_n(scratch.most.begin(), up(rows, LANES) / LANES, all(LOWEST));
    std::fill_n(scratch.sum.begin(), up(rows, LANES) / LANES, vec{});

    const int64_t last = tile.first + tile.count - 1;
    int64_t seen = tile.length, begin = 0;
    if (score.window) {
        begin = std::max<int64_t>(0, tile.first - score.window + 1) / BLOCK * BLOCK;
        seen = std::min(seen, last + score.window);
    }
    if (score.causal) seen = last + 1;
    for (; begin < seen; begin += BLOCK) {
        const int64_t end = std::min<int64_t>(begin + BLOCK, seen);
        for (int64_t k = begin; k < end; ++k) {
            const T* key = keys.at(tile.places[k], kv_head);
            const T* value = values.at(tile.places[k], kv_head);
            float* wide_key = scratch.keys.data() + (k - begin) * depth;
            float* wide_value = scratch.values.data() + (k - begin) * scratch.width;
            widen_turned(key, turn, tile.places[k], depth, wide_key);
            for (int64_t d = 0; d < value_depth; ++d) wide_value[d] = widen(value[d]);
        }
        for (int64_t row = 0; row < rows; row += GROUP) {
            const int64_t count = std::min<int64_t>(GROUP, rows - row);
            int64_t here = end;
            if (score.causal) here = std::min(end, tile.first + (row + count - 1) / heads + 1);
            if (here > begin)
                attend_some<VECTORS>(up(count, LANES) / LANES, scratch, tile, heads, row, begin,
                                     here, depth, score);
        }
    }
    return write_results(results, rows, value_depth, scratch);
}

template <class T>
void attend(const Rows<const T>& queries, const Rows<const T>& keys, const Rows<const T>& values,
            const Rows<T>& results, const Turn<T>& turn, const std::vector<Tile>& tiles,
            int64_t kv_heads, int64_t heads, int64_t depth, int64_t value_depth,
            const Score& score, int threads) {
    int64_t rows = 0;
    for (const Tile& tile : tiles) rows = std::max(rows, tile.count * heads);
    const int64_t count = int64_t(tiles.size()) * kv_heads;  // pieces: a tile's rows of one kv_head
    // heads of a tile lie side by side: one after the other, where there are pieces enough
    const int64_t together = std::clamp<int64_t>(count / (threads * TURNS), 1, kv_heads);
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(rows, depth, value_depth);
#pragma omp for schedule(dynamic, together)
        for (int64_t i = count - 1; i >= 0; --i)  // a text's last tiles see most: they go first
        {
            const Tile& tile = tiles[i / kv_heads];
            auto run = [&](const Tile& some) {
                return attend_tile(queries, keys, values, results, some, turn, i % kv_heads, heads,
                                   depth, value_depth, score, scratch);
            };
            if (run(tile) || !score.causal) continue;
            // zero times infinity spoils rows that do not see it: once more, one query at a time
            for (int64_t position = 0; position < tile.count; ++position)
                run({tile.places, tile.length, tile.first + position, 1});
        }
    }
}

}  // namespace

extern "C" void rayreward_attention(
    int is_bfloat16, const void* queries, const void* keys, const void* values, void* results,
    const int64_t* strides, int64_t tokens, int64_t kv_heads, int64_t heads, int64_t depth,
    int64_t value_depth, const Angles* angles, const Layout* layout, float scale, float cap,
    int64_t window, int threads) {
    std::vector<Tile> tiles;
    int64_t rows = 0;
    for (int64_t text = 0; text < layout->texts; ++text)
        rows += (layout->lengths[text] - layout->owned_from[text]) * heads;
    const int64_t groups = rows * kv_heads / (threads * PIECES) / GROUP;
    const int64_t most =  // queries in a tile
        std::max<int64_t>(1, std::clamp<int64_t>(groups, 1, MOST_GROUPS) * GROUP / heads);
    const int64_t* places = layout->places;
    for (int64_t text = 0; text < layout->texts; places += layout->lengths[text++]) {
        const int64_t length = layout->lengths[text];
        for (int64_t first = layout->owned_from[text]; first < length; first += most)
            tiles.push_back({places, length, first, std::min(most, length - first)});
    }
    const Score score{scale, cap, window, layout->causal != 0};
    auto run = [&](auto zero) {
        using T = decltype(zero);
        const Rows<T> out{static_cast<T*>(results), strides[6], strides[7]};
        for (int64_t place = layout->owned; place < tokens; ++place)
            for (int64_t head = 0; head < kv_heads * heads; ++head)
                std::fill_n(out.at(place, head), value_depth, zero);
        Turn<T> turn{};
        if (angles)
            turn = {static_cast<const T*>(angles->cosines), static_cast<const T*>(angles->sines),
                    angles->cosines_place, angles->sines_place};
        attend<T>({static_cast<const T*>(queries), strides[0], strides[1]},
                  {static_cast<const T*>(keys), strides[2], strides[3]},
                  {static_cast<const T*>(values), strides[4], strides[5]}, out, turn, tiles,
                  kv_heads, heads, depth, value_depth, score, threads);
    };
    if (is_bfloat16) run(BFloat16{}); else run(0.0f);
}

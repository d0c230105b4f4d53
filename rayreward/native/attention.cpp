// Attention over a flat stream, for CPUs. Called from native/__init__.py.
//
// A token's result depends, bit for bit, on its own text up to where it sees, and on nothing else:
// scores are summed over D in one order; keys are taken in blocks that begin at multiples of BLOCK
// from the text's first token; what a query does not see adds an exact zero. So neither the rest of
// the batch, nor how a text is cut into tiles, nor the number of threads moves a bit.
//
// Keys and values are turned into float32 panels as they are used, and everything is summed in
// float32. Online softmax as in FlashAttention (Dao et al., 2022).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, COLUMNS = 4, ROWS = 6;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, COLUMNS = 2, ROWS = 6;  // 12 of 16
#else
constexpr int LANES = 4, COLUMNS = 4, ROWS = 6;  // 24 of 32 on ARM
#endif
constexpr int BLOCK = 64;                 // keys that are taken at once
constexpr int PANEL = LANES * COLUMNS;    // keys, or columns of values, that a product runs over
constexpr int TILE_ROWS = 256;            // queries times heads that share packed keys, about
constexpr float UNSEEN = -INFINITY, LOWEST = -1e30f;
static_assert(BLOCK % PANEL == 0);

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

inline vec load(const float* from) {
    vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }
inline vec all(float value) { return value - vec{}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

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

struct BFloat16 {
    uint16_t bits;
};
inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, BFloat16& to) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) {
        to.bits = 0x7fc0;
    } else {
        to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
    }
}

template <class T>
struct Rows {  // (places, heads, D), D dense
    T* data;
    int64_t place, head;
    T* at(int64_t p, int64_t h) const { return data + p * place + h * head; }
};

struct Score {
    float scale, cap;  // cap 0 for none
    int64_t window;    // 0 for all
    bool causal;
};

// R rows of queries times PANEL keys, summed over `depth` in order.
template <int R>
inline void multiply_keys(const float* queries, int64_t stride, const float* keys, int64_t depth,
                          float* scores) {
    vec sums[R][COLUMNS] = {};
    for (int64_t d = 0; d < depth; ++d, keys += PANEL) {
        vec key[COLUMNS];
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) key[c] = load(keys + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            vec query = all(queries[r * stride + d]);
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; ++c) sums[r][c] += query * key[c];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) store(scores + r * BLOCK + c * LANES, sums[r][c]);
}

// sums = sums · shrink + weights · values, over PANEL columns and `count` keys in order.
template <int R>
inline void add_values(const float* weights, const float* values, int64_t stride, int64_t count,
                       const float* shrink, float* results) {
    vec sums[R][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c)
            sums[r][c] = load(results + r * stride + c * LANES) * shrink[r];
    for (int64_t k = 0; k < count; ++k, values += stride) {
        vec value[COLUMNS];
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) value[c] = load(values + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            vec weight = all(weights[r * BLOCK + k]);
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; ++c) sums[r][c] += weight * value[c];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) store(results + r * stride + c * LANES, sums[r][c]);
}

struct Tile {
    const int64_t* places;   // of its text's tokens
    int64_t length;          // of its text
    int64_t first, count;    // its queries, by position
};

struct Scratch {
    std::vector<float> queries, keys, values, results, most, sum;
    Scratch(int64_t rows, int64_t depth, int64_t width)
        : queries(rows * depth), keys(BLOCK * depth), values(BLOCK * width), results(rows * width),
          most(rows), sum(rows) {}
};

// R rows, the first of which is `row` of the tile, against the block of keys from `begin` on.
template <int R>
void attend_rows(Scratch& scratch, const Tile& tile, int64_t heads, int64_t row, int64_t begin,
                 int64_t end, int64_t depth, int64_t width, const Score& score) {
    float scores[R * BLOCK], shrink[R];
    const float* queries = scratch.queries.data() + row * depth;
    for (int64_t panel = 0; panel < end - begin; panel += PANEL)
        multiply_keys<R>(queries, depth, scratch.keys.data() + panel * depth, depth,
                         scores + panel);
    const int64_t whole = (end - begin + PANEL - 1) / PANEL * PANEL;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        float* mine = scores + r * BLOCK;
        const int64_t position = tile.first + (row + r) / heads;
        const int64_t up_to = score.causal ? position : score.window ? std::min(position + score.window - 1, tile.length - 1) : tile.length - 1;
        const int64_t from = score.window ? std::max<int64_t>(0, position - score.window + 1) : 0;
        if (score.cap)
            for (int64_t k = 0; k < whole; k += LANES)
                store(mine + k, capped(load(mine + k), score.cap));
        for (int64_t k = 0; k < std::min(from - begin, whole); ++k) mine[k] = UNSEEN;
        for (int64_t k = std::max<int64_t>(0, up_to + 1 - begin); k < whole; ++k) mine[k] = UNSEEN;
        float& most = scratch.most[row + r];
        vec best = all(most);
        for (int64_t k = 0; k < whole; k += LANES) best = larger(load(mine + k), best);
        float now = most;
        for (int lane = 0; lane < LANES; ++lane) now = best[lane] > now ? best[lane] : now;
        vec sum{};
        for (int64_t k = 0; k < whole; k += LANES) {
            vec weight = exponential(load(mine + k) - now);
            store(mine + k, weight);
            sum += weight;
        }
        for (int half = LANES / 2; half; half /= 2)  // in one order, whatever the block holds
            for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
        shrink[r] = exponential(all(most - now))[0];
        scratch.sum[row + r] = scratch.sum[row + r] * shrink[r] + sum[0];
        most = now;
    }
    float* results = scratch.results.data() + row * width;
    for (int64_t panel = 0; panel < width; panel += PANEL)
        add_values<R>(scores, scratch.values.data() + panel, width, end - begin, shrink,
                      results + panel);
}

template <class T>
void attend_tile(const Rows<const T>& queries, const Rows<const T>& keys,
                 const Rows<const T>& values, const Rows<T>& results, const Tile& tile,
                 int64_t kv_head, int64_t heads, int64_t depth, int64_t value_depth,
                 const Score& score, Scratch& scratch) {
    const int64_t width = (value_depth + PANEL - 1) / PANEL * PANEL, rows = tile.count * heads;
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = queries.at(tile.places[tile.first + row / heads], kv_head * heads + row % heads);
        for (int64_t d = 0; d < depth; ++d)
            scratch.queries[row * depth + d] = widen(from[d]) * score.scale;
    }
    std::fill_n(scratch.results.begin(), rows * width, 0.0f);
    std::fill_n(scratch.most.begin(), rows, LOWEST);
    std::fill_n(scratch.sum.begin(), rows, 0.0f);

    const int64_t last = tile.first + tile.count - 1;
    int64_t seen = tile.length, begin = 0;
    if (score.window) {
        begin = std::max<int64_t>(0, tile.first - score.window + 1) / BLOCK * BLOCK;
        seen = std::min(seen, last + score.window);
    }
    if (score.causal) seen = last + 1;
    for (; begin < seen; begin += BLOCK) {
        const int64_t end = std::min<int64_t>(begin + BLOCK, seen);
        std::fill(scratch.keys.begin(), scratch.keys.end(), 0.0f);
        for (int64_t k = begin; k < end; ++k) {
            const T* key = keys.at(tile.places[k], kv_head);
            const T* value = values.at(tile.places[k], kv_head);
            float* packed = scratch.keys.data() + (k - begin) / PANEL * PANEL * depth + (k - begin) % PANEL;
            for (int64_t d = 0; d < depth; ++d) packed[d * PANEL] = widen(key[d]);
            float* wide = scratch.values.data() + (k - begin) * width;
            for (int64_t d = 0; d < value_depth; ++d) wide[d] = widen(value[d]);
        }
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t count = std::min<int64_t>(ROWS, rows - row);
            int64_t here = end;
            if (score.causal) here = std::min(end, tile.first + (row + count - 1) / heads + 1);
            if (here <= begin) continue;
            switch (count) {
                case 6: attend_rows<6>(scratch, tile, heads, row, begin, here, depth, width, score); break;
                case 5: attend_rows<5>(scratch, tile, heads, row, begin, here, depth, width, score); break;
                case 4: attend_rows<4>(scratch, tile, heads, row, begin, here, depth, width, score); break;
                case 3: attend_rows<3>(scratch, tile, heads, row, begin, here, depth, width, score); break;
                case 2: attend_rows<2>(scratch, tile, heads, row, begin, here, depth, width, score); break;
                default: attend_rows<1>(scratch, tile, heads, row, begin, here, depth, width, score);
            }
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        T* to = results.at(tile.places[tile.first + row / heads], kv_head * heads + row % heads);
        const float share = 1.0f / scratch.sum[row];
        for (int64_t d = 0; d < value_depth; ++d)
            narrow(scratch.results[row * width + d] * share, to[d]);
    }
}

template <class T>
void attend(const Rows<const T>& queries, const Rows<const T>& keys, const Rows<const T>& values,
            const Rows<T>& results, const std::vector<Tile>& tiles, int64_t kv_heads,
            int64_t heads, int64_t depth, int64_t value_depth, const Score& score, int threads) {
    int64_t rows = 0;
    for (const Tile& tile : tiles) rows = std::max(rows, tile.count * heads);
    const int64_t width = (value_depth + PANEL - 1) / PANEL * PANEL;
    const int64_t count = int64_t(tiles.size()) * kv_heads;
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(rows, depth, width);
#pragma omp for schedule(dynamic)
        for (int64_t i = count - 1; i >= 0; --i)  // a text's last tiles see most: they go first
            attend_tile(queries, keys, values, results, tiles[i / kv_heads], i % kv_heads, heads,
                        depth, value_depth, score, scratch);
    }
}

}  // namespace

// Shapes and strides are in elements: queries (T, heads, D), keys (T, kv_heads, D), values
// (T, kv_heads, E), results (T, heads, E); each row of D or E is dense.
extern "C" void rayreward_attention(
    int is_bfloat16, const void* queries, const void* keys, const void* values, void* results,
    const int64_t* strides,                   // (place, head) of queries, keys, values, results
    int64_t kv_heads, int64_t heads,          // heads to each of the kv_heads
    int64_t depth, int64_t value_depth,
    const int64_t* places, const int64_t* lengths, const int64_t* owned_from, int64_t texts,
    float scale, float cap, int64_t window, int causal, int threads) {
    std::vector<Tile> tiles;
    const int64_t most = std::max<int64_t>(1, TILE_ROWS / heads);
    for (int64_t text = 0; text < texts; places += lengths[text++])
        for (int64_t first = owned_from[text]; first < lengths[text]; first += most)
            tiles.push_back({places, lengths[text], first, std::min(most, lengths[text] - first)});
    const Score score{scale, cap, window, causal != 0};
    auto run = [&](auto zero) {
        using T = decltype(zero);
        attend<T>({static_cast<const T*>(queries), strides[0], strides[1]},
                  {static_cast<const T*>(keys), strides[2], strides[3]},
                  {static_cast<const T*>(values), strides[4], strides[5]},
                  {static_cast<T*>(results), strides[6], strides[7]}, tiles, kv_heads, heads,
                  depth, value_depth, score, threads);
    };
    if (is_bfloat16) run(BFloat16{}); else run(0.0f);
}

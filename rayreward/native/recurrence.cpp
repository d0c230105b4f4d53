// Gated delta rules over a stream of texts, in float32. Called from recurrence.py.
//
// Token after token, as such a rule is defined, and not in chunks: so no bit goes by where a text
// lies, by what else the stream holds, or by threads. Columns of a state have nothing to do with one
// another, so some of them at a time stay in a core's first cache while all tokens pass.

#include "recurrence.h"
#include "floats.h"

#include <algorithm>

namespace {

constexpr int LANES = 16, VECTORS = 2, COLUMNS = LANES * VECTORS;
constexpr float EPSILON = 1e-6f;  // as transformers' l2norm has it

typedef float vec __attribute__((vector_size(4 * LANES)));

struct Rule {
    const float *queries, *keys, *values, *decays, *betas;
    float* results;
    const int32_t *from, *into;
    int64_t tokens, key_heads, value_heads, key_size, value_size, slots;
};

// What each of `count` rows is multiplied by to be as long as `scale`; or the scale alone.
void find_factors(const float* rows, int64_t count, int64_t size, bool normalize, float scale,
                  float* factors) {
#pragma omp for
    for (int64_t row = 0; row < count; ++row) {
        const float* of = rows + row * size;
        vec squares{};
        int64_t k = 0;
        for (; k + LANES <= size; k += LANES) squares += load<vec>(of + k) * load<vec>(of + k);
        float sum = 0;
        for (; k < size; ++k) sum += of[k] * of[k];
        for (int lane = 0; lane < LANES; ++lane) sum += squares[lane];
        factors[row] = normalize ? scale / std::sqrt(sum + EPSILON) : scale;
    }
}

// COLUMNS of a head's state, or as many as are left, through all tokens.
void run(const Rule& rule, const float* of_queries, const float* of_keys, int64_t head,
         int64_t first, float* state, float* kept) {
    const int64_t key_head = head / (rule.value_heads / rule.key_heads);
    const int64_t count = std::min<int64_t>(COLUMNS, rule.value_size - first);
    const int64_t floats = rule.key_size * COLUMNS;
    for (int64_t t = 0; t < rule.tokens; ++t) {
        const int64_t row = t * rule.key_heads + key_head;
        const float* query = rule.queries + row * rule.key_size;
        const float* key = rule.keys + row * rule.key_size;
        const int64_t at = (t * rule.value_heads + head) * rule.value_size + first;
        if (rule.from[t] >= 0)
            std::copy_n(kept + rule.from[t] * floats, floats, state);
        else if (rule.from[t] == ZEROS)
            std::fill_n(state, floats, 0.0f);
        const float decay = std::exp(rule.decays[t * rule.value_heads + head]);
        const float beta = rule.betas[t * rule.value_heads + head];
        const float of_query = of_queries[row], of_key = of_keys[row];
        vec known[VECTORS] = {}, change[VECTORS], result[VECTORS] = {};
        for (int64_t k = 0; k < rule.key_size; ++k)
            for (int v = 0; v < VECTORS; ++v)
                known[v] += key[k] * load<vec>(state + k * COLUMNS + v * LANES);
        float given[COLUMNS] = {};
        std::copy_n(rule.values + at, count, given);
        for (int v = 0; v < VECTORS; ++v)
            change[v] = beta * of_key * (load<vec>(given + v * LANES) - decay * of_key * known[v]);
        for (int64_t k = 0; k < rule.key_size; ++k)
            for (int v = 0; v < VECTORS; ++v) {
                float* part = state + k * COLUMNS + v * LANES;
                const vec now = decay * load<vec>(part) + key[k] * change[v];
                store(part, now);
                result[v] += query[k] * now;
            }
        for (int v = 0; v < VECTORS; ++v) store(given + v * LANES, of_query * result[v]);
        std::copy_n(given, count, rule.results + at);
        if (rule.into[t] >= 0) std::copy_n(state, floats, kept + rule.into[t] * floats);
    }
}

}  // namespace

extern "C" void rayreward_recurrence(const float* queries, const float* keys, const float* values,
                                     const float* decays, const float* betas, float* results,
                                     const int32_t* from, const int32_t* into,
                                     const int64_t* shape, int normalize, float scale,
                                     int threads) {
    const Rule rule{queries,  keys,     values,   decays,   betas,    results, from, into,
                    shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
    const int64_t rows = rule.tokens * rule.key_heads;
    Floats<vec> of_queries(rows), of_keys(rows);
    const int64_t parts = (rule.value_size + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads)
    {
        find_factors(queries, rows, rule.key_size, normalize, scale, of_queries.data());
        find_factors(keys, rows, rule.key_size, normalize, 1, of_keys.data());
        Floats<vec> state(rule.key_size * COLUMNS);
        Floats<vec> kept(rule.slots * rule.key_size * COLUMNS);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t head = 0; head < rule.value_heads; ++head)
            for (int64_t part = 0; part < parts; ++part)
                run(rule, of_queries.data(), of_keys.data(), head, part * COLUMNS, state.data(),
                    kept.data());
    }
}

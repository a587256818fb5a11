/* Attention of single rows: what a token looks back at, read once and in order.
 *
 * A part is one row and one head of keys with the query heads of its group. Keys are gone through in pieces whose scores
 * stay in the innermost cache: scores, their exponentials relative to the largest so far, and the values by them.
 * Everything in float32, whatever the cache holds; one rounding at the end. A piece goes on where a run of tokens ends, so
 * that a row's bits do not depend on where its keys lie.
 */

#include "kernels.h"

#ifdef HAS_KERNELS

#include <float.h>
#include <math.h>
#include <stdatomic.h>

#define PIECE 128      /* tokens */

/* Tokens [first, first + count) of the cache: numbers [at, at + count) of a piece. */
typedef struct {
    Py_ssize_t first, count, at;
} Stretch;

/* Of `rows` queries and the keys of a stretch: the scores. */
WITH() static inline __attribute__((always_inline)) void score(
    const Attention *a, const char *keys, Stretch stretch, const int rows, const int is_bfloat,
    float queries[TOGETHER][HEAD_WIDTH_MAX], float scores[TOGETHER][PIECE])
{
    for (Py_ssize_t token = 0; token < stretch.count; token++) {
        Py_ssize_t at = (stretch.first + token) * a->token;
        __m512 sums[TOGETHER];
        UNROLLED
        for (int row = 0; row < rows; row++) sums[row] = _mm512_setzero_ps();
        for (Py_ssize_t number = 0; number < a->width; number += 16) {
            __m512 key = read_at(keys, at + number, within(a->width, number), is_bfloat);
            UNROLLED
            for (int row = 0; row < rows; row++)
                sums[row] = _mm512_fmadd_ps(key, _mm512_load_ps(queries[row] + number), sums[row]);
        }
        UNROLLED
        for (int row = 0; row < rows; row++) scores[row][stretch.at + token] = _mm512_reduce_add_ps(sums[row]);
    }
}

/* Add the values of a stretch by their weights. */
WITH() static inline __attribute__((always_inline)) void add_values(
    const Attention *a, const char *values, Stretch stretch, const int rows, const int is_bfloat,
    float weights[TOGETHER][PIECE], float mixed[TOGETHER][HEAD_WIDTH_MAX])
{
    for (Py_ssize_t number = 0; number < a->width; number += 16 * LANES) {
        __m512 sums[TOGETHER][LANES];
        __mmask16 masks[LANES];
        UNROLLED
        for (int lane = 0; lane < LANES; lane++) masks[lane] = within(a->width, number + 16 * lane);
        UNROLLED
        for (int row = 0; row < rows; row++)
            UNROLLED
            for (int lane = 0; lane < LANES; lane++) sums[row][lane] = _mm512_load_ps(mixed[row] + number + 16 * lane);
        for (Py_ssize_t token = 0; token < stretch.count; token++) {
            Py_ssize_t at = (stretch.first + token) * a->token + number;
            __m512 read[LANES];
            UNROLLED
            for (int lane = 0; lane < LANES; lane++)
                read[lane] = read_at(values, at + 16 * lane, masks[lane], is_bfloat);
            UNROLLED
            for (int row = 0; row < rows; row++) {
                __m512 weight = _mm512_set1_ps(weights[row][stretch.at + token]);
                UNROLLED
                for (int lane = 0; lane < LANES; lane++)
                    sums[row][lane] = _mm512_fmadd_ps(weight, read[lane], sums[row][lane]);
            }
        }
        UNROLLED
        for (int row = 0; row < rows; row++)
            UNROLLED
            for (int lane = 0; lane < LANES; lane++) _mm512_store_ps(mixed[row] + number + 16 * lane, sums[row][lane]);
    }
}

/* Each number of rows has functions of its own, so that compilers keep its sums in registers. */
typedef void Step(const Attention *, const char *, Stretch, float[TOGETHER][HEAD_WIDTH_MAX], float[TOGETHER][PIECE]);

#define DEFINE(ROWS)                                                                                                   \
    WITH() __attribute__((noinline)) static void score_##ROWS(                                                         \
        const Attention *a, const char *keys, Stretch stretch, float wide[TOGETHER][HEAD_WIDTH_MAX],                        \
        float scores[TOGETHER][PIECE])                                                                                 \
    {                                                                                                                  \
        if (a->is_bfloat)                                                                                              \
            score(a, keys, stretch, ROWS, 1, wide, scores);                                                            \
        else                                                                                                           \
            score(a, keys, stretch, ROWS, 0, wide, scores);                                                            \
    }                                                                                                                  \
    WITH() __attribute__((noinline)) static void mix_##ROWS(                                                           \
        const Attention *a, const char *values, Stretch stretch, float wide[TOGETHER][HEAD_WIDTH_MAX],                      \
        float weights[TOGETHER][PIECE])                                                                                \
    {                                                                                                                  \
        if (a->is_bfloat)                                                                                              \
            add_values(a, values, stretch, ROWS, 1, weights, wide);                                                           \
        else                                                                                                           \
            add_values(a, values, stretch, ROWS, 0, weights, wide);                                                           \
    }

DEFINE(1)
DEFINE(2)
DEFINE(3)
DEFINE(4)
DEFINE(5)
DEFINE(6)

static Step *const score_rows[TOGETHER] = {score_1, score_2, score_3, score_4, score_5, score_6};
static Step *const mix_rows[TOGETHER] = {mix_1, mix_2, mix_3, mix_4, mix_5, mix_6};

/* Scores to weights, relative to the largest so far; what came before fades accordingly. */
WITH() static void weigh(float scores[PIECE], Py_ssize_t count, Py_ssize_t width, float *largest, float *total, float *mixed)
{
    __m512 most = _mm512_set1_ps(*largest);
    for (Py_ssize_t at = 0; at < count; at += 16) {
        __mmask16 mask = within(count, at);
        most = _mm512_mask_max_ps(most, mask, most, _mm512_load_ps(scores + at));
    }
    float now = _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps(), above = _mm512_set1_ps(now);
    for (Py_ssize_t at = 0; at < count; at += 16) {
        __mmask16 mask = within(count, at);
        __m512 weight = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + at), above));
        _mm512_store_ps(scores + at, weight);
        sum = _mm512_mask_add_ps(sum, mask, sum, weight);
    }
    if (now > *largest && *total > 0) {
        __m512 fade = exponential(_mm512_set1_ps(*largest - now));
        *total *= _mm512_cvtss_f32(fade);
        for (Py_ssize_t number = 0; number < width; number += 16)
            _mm512_store_ps(mixed + number, _mm512_mul_ps(_mm512_load_ps(mixed + number), fade));
    }
    *largest = now;
    *total += _mm512_reduce_add_ps(sum);
}

/* `rows` query heads from `query` on, of the row `index` of the answer. */
WITH(",avx512bf16") static void attend_heads(const Attention *a, Py_ssize_t index, Py_ssize_t query, int rows)
{
    _Alignas(64) float queries[TOGETHER][HEAD_WIDTH_MAX], mixed[TOGETHER][HEAD_WIDTH_MAX], scores[TOGETHER][PIECE];
    float largest[TOGETHER], total[TOGETHER], scale = 1.0f / sqrtf((float)a->width);
    const int64_t *read = a->reads + 3 * index;
    Py_ssize_t size = a->is_bfloat ? 2 : 4, head = query / (a->heads / a->key_heads) * a->head * size;
    for (int row = 0; row < rows; row++) {
        Py_ssize_t at = (query + row) * a->query_head + read[0] * a->width;
        for (Py_ssize_t number = 0; number < a->width; number += 64)
            for (int lane = 0; lane < LANES; lane++) {
                __mmask16 mask = within(a->width, number + 16 * lane);
                __m512 part = read_at(a->queries, at + number + 16 * lane, mask, a->is_bfloat);
                _mm512_store_ps(queries[row] + number + 16 * lane, _mm512_mul_ps(part, _mm512_set1_ps(scale)));
                _mm512_store_ps(mixed[row] + number + 16 * lane, _mm512_setzero_ps());
            }
        largest[row] = -FLT_MAX, total[row] = 0; /* finite: the first scores may all be -inf */
    }
    int64_t place = read[1];
    Py_ssize_t used = 0; /* of the place */
    while (place < read[2]) {
        Stretch stretches[PIECE];
        Py_ssize_t count = 0, length = 0;
        for (; length < PIECE && place < read[2]; count++) {
            Py_ssize_t left = a->places[2 * place + 1] - used, taken = left < PIECE - length ? left : PIECE - length;
            stretches[count] = (Stretch){a->places[2 * place] + used, taken, length};
            score_rows[rows - 1](a, a->keys + head, stretches[count], queries, scores);
            length += taken, used += taken;
            if (taken == left) place++, used = 0;
        }
        for (int row = 0; row < rows; row++)
            weigh(scores[row], length, a->width, largest + row, total + row, mixed[row]);
        for (Py_ssize_t each = 0; each < count; each++)
            mix_rows[rows - 1](a, a->values + head, stretches[each], mixed, scores);
    }
    for (int row = 0; row < rows; row++) {
        Py_ssize_t at = (index * a->heads + query + row) * a->width;
        for (Py_ssize_t number = 0; number < a->width; number += 16) {
            __mmask16 mask = within(a->width, number);
            __m512 sum = _mm512_div_ps(_mm512_load_ps(mixed[row] + number), _mm512_set1_ps(total[row]));
            if (a->is_bfloat)
                _mm256_mask_storeu_epi16((uint16_t *)a->answer + at + number, mask, (__m256i)_mm512_cvtneps_pbh(sum));
            else
                _mm512_mask_storeu_ps((float *)a->answer + at + number, mask, sum);
        }
    }
}

typedef struct {
    const Attention *attention;
    atomic_long next; /* the first part that nobody has taken */
} Parts;

static void work(void *data)
{
    Parts *parts = data;
    const Attention *a = parts->attention;
    Py_ssize_t group = a->heads / a->key_heads;
    for (;;) {
        Py_ssize_t part = atomic_fetch_add(&parts->next, 1);
        if (part >= a->rows * a->key_heads) return;
        for (Py_ssize_t from = 0; from < group; from += TOGETHER) {
            Py_ssize_t rows = group - from < TOGETHER ? group - from : TOGETHER;
            attend_heads(a, part % a->rows, part / a->rows * group + from, (int)rows); /* rows of one sequence share keys */
        }
    }
}

int attend_rows(const Attention *a, Py_ssize_t threads)
{
    if (a->rows < 1 || a->key_heads < 1 || a->heads % a->key_heads || a->width < 1 || a->width > HEAD_WIDTH_MAX)
        return 0;
    Parts parts = {a, 0};
    in_threads(work, &parts, threads_for(threads, a->rows * a->key_heads, a->bytes));
    return 1;
}

PyObject *attend(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    /* queries, keys, values, reads, places, answer, rows, heads, key heads, width, query head's stride, head's stride,
     * token's stride, whether in bfloat16, bytes that are read, threads */
    Py_ssize_t n[16];
    int fits;
    if (!read_numbers(args, given, 16, n)) return NULL;
    Attention a = {(char *)n[0], (char *)n[1], (char *)n[2], (int64_t *)n[3], (int64_t *)n[4], (char *)n[5],
                   n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[14], (int)n[13]};
    Py_BEGIN_ALLOW_THREADS;
    fits = attend_rows(&a, n[15]);
    Py_END_ALLOW_THREADS;
    if (fits) Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "no such attention");
    return NULL;
}

#endif

/* Products of few rows with weights that oneDNN has packed: x [rows, in] times W^T, for W [out, in].
 *
 * At few rows a product is the reading of its weights. oneDNN's layout is one stream: 64 outputs ("a block") lie beside
 * each other, and block follows block. Read from beginning to end, a little ahead and past the outer caches, it comes as
 * fast as the memory gives it; oneDNN's own kernels were measured at half of that.
 *
 * A step is 256 bytes: what 64 outputs take of one input (float32), of two (bfloat16) or of four (int8), and of a row of
 * x one 32-bit word. What differs between precisions is one instruction.
 *
 * Invariant: a row is summed in the order of its inputs, whatever rows are beside it and however many threads there
 * are, so its bits depend on the row alone.
 */

#include "kernels.h"

#ifdef HAS_KERNELS

#include <stdatomic.h>
#include <string.h>

#define OUTPUTS 64               /* of a block */
#define STEP_BYTES 256
#define CHUNK_STEPS 64           /* 16 KiB of weights, which the innermost cache keeps for the next rows */
#define AHEAD_BYTES 4096         /* of weights, that are under way from the memory */
#define SHARES 4                 /* of a thread: one that is held up keeps the others waiting for a part of its work */
#define ZERO 128                 /* of int8's inputs, which are unsigned */
#define LEVELS 127.0f

typedef struct Product Product;

struct Product {
    const char *weight;
    const uint32_t *x; /* [rows, steps] */
    const void *bias;  /* [out] as the weights are, int8's in float32; or none */
    const float *scale, *factor; /* int8: of the outputs, and of the rows */
    const int32_t *offset;       /* int8: [out], ZERO times the sum of the weights */
    char *y;                     /* [rows, out]: float32, or bfloat16 as the weights */
    Py_ssize_t rows, steps, stride, out; /* stride: steps from block to block */
    const Add *add; /* for 1 to TOGETHER rows */
    void (*finish)(const Product *, Py_ssize_t, const Sums *);
    Py_ssize_t share; /* blocks that a thread takes at a time */
    atomic_long next; /* the first block that nobody has taken */
};

/* NAME_ROWS(weight, x, steps, count, sums): `count` more steps of one block for ROWS rows. Each number of rows has a
 * function of its own, so that compilers keep its sums in registers. `ONE(sum, weight, word)` adds a step to a register. */
#define DEFINE_ROWS(NAME, TARGET, ONE, ROWS)                                                                           \
    TARGET __attribute__((noinline)) static void NAME##_##ROWS(                                                        \
        const char *weight, const uint32_t *x, Py_ssize_t steps, Py_ssize_t count, Sums *sums)                         \
    {                                                                                                                  \
        Sums held[ROWS];                                                                                               \
        UNROLLED                                                                                                       \
        for (int row = 0; row < ROWS; row++)                                                                           \
            UNROLLED                                                                                                   \
            for (int lane = 0; lane < LANES; lane++) held[row][lane] = sums[row][lane];                                \
        for (; count--; x++, weight += STEP_BYTES) {                                                                   \
            Sums read;                                                                                                 \
            UNROLLED                                                                                                   \
            for (int lane = 0; lane < LANES; lane++) {                                                                 \
                _mm_prefetch(weight + AHEAD_BYTES + 64 * lane, _MM_HINT_NTA);                                          \
                read[lane] = _mm512_loadu_si512(weight + 64 * lane);                                                   \
            }                                                                                                          \
            UNROLLED                                                                                                   \
            for (int row = 0; row < ROWS; row++) {                                                                     \
                __m512i word = _mm512_set1_epi32((int)x[row * steps]);                                                 \
                UNROLLED                                                                                               \
                for (int lane = 0; lane < LANES; lane++) held[row][lane] = ONE(held[row][lane], read[lane], word);     \
            }                                                                                                          \
        }                                                                                                              \
        UNROLLED                                                                                                       \
        for (int row = 0; row < ROWS; row++)                                                                           \
            UNROLLED                                                                                                   \
            for (int lane = 0; lane < LANES; lane++) sums[row][lane] = held[row][lane];                                \
    }

#define DEFINE(NAME, TARGET, ONE)                                                                                      \
    DEFINE_ROWS(NAME, TARGET, ONE, 1)                                                                                  \
    DEFINE_ROWS(NAME, TARGET, ONE, 2)                                                                                  \
    DEFINE_ROWS(NAME, TARGET, ONE, 3)                                                                                  \
    DEFINE_ROWS(NAME, TARGET, ONE, 4)                                                                                  \
    DEFINE_ROWS(NAME, TARGET, ONE, 5)                                                                                  \
    DEFINE_ROWS(NAME, TARGET, ONE, 6)                                                                                  \
    const Add NAME[TOGETHER] = {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6};

#define ADD_FLOATS(sum, weight, word)                                                                                  \
    _mm512_castps_si512(                                                                                               \
        _mm512_fmadd_ps(_mm512_castsi512_ps(weight), _mm512_castsi512_ps(word), _mm512_castsi512_ps(sum)))
#define ADD_BFLOATS(sum, weight, word)                                                                                 \
    _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)(weight), (__m512bh)(word)))
#define ADD_BYTES(sum, weight, word) _mm512_dpbusd_epi32(sum, word, weight)

DEFINE(add_floats, WITH(), ADD_FLOATS)
DEFINE(add_bfloats, WITH(",avx512bf16"), ADD_BFLOATS)
DEFINE(add_bytes, WITH(",avx512vnni"), ADD_BYTES)

WITH() static void finish_floats(const Product *p, Py_ssize_t output, const Sums *sums)
{
    const float *bias = p->bias;
    for (Py_ssize_t row = 0; row < p->rows; row++)
        for (int lane = 0; lane < LANES; lane++) {
            Py_ssize_t at = output + 16 * lane;
            __mmask16 mask = within(p->out, at);
            __m512 sum = _mm512_castsi512_ps(sums[row][lane]);
            if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias + at));
            _mm512_mask_storeu_ps((float *)p->y + row * p->out + at, mask, sum);
        }
}

WITH(",avx512bf16") static void finish_bfloats(const Product *p, Py_ssize_t output, const Sums *sums)
{
    const uint16_t *bias = p->bias;
    for (Py_ssize_t row = 0; row < p->rows; row++)
        for (int lane = 0; lane < LANES; lane++) {
            Py_ssize_t at = output + 16 * lane;
            __mmask16 mask = within(p->out, at);
            __m512 sum = _mm512_castsi512_ps(sums[row][lane]);
            if (bias) {
                __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias + at));
                sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
            }
            _mm256_mask_storeu_epi16((uint16_t *)p->y + row * p->out + at, mask, (__m256i)_mm512_cvtneps_pbh(sum));
        }
}

WITH() static void finish_bytes(const Product *p, Py_ssize_t output, const Sums *sums)
{
    const float *bias = p->bias;
    for (Py_ssize_t row = 0; row < p->rows; row++) {
        __m512 factor = _mm512_set1_ps(p->factor[row]);
        for (int lane = 0; lane < LANES; lane++) {
            Py_ssize_t at = output + 16 * lane;
            __mmask16 mask = within(p->out, at);
            __m512i whole = _mm512_sub_epi32(sums[row][lane], _mm512_maskz_loadu_epi32(mask, p->offset + at));
            __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_maskz_loadu_ps(mask, p->scale + at));
            sum = _mm512_mul_ps(sum, factor);
            if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias + at));
            _mm512_mask_storeu_ps((float *)p->y + row * p->out + at, mask, sum);
        }
    }
}

/* Rows of x [rows, in] as bytes around ZERO, padded to whole words, and the factor of each: not finite where a number
 * is not, whose bits are then the largest as a whole number too. */
WITH() static void quantise(const float *x, Py_ssize_t rows, Py_ssize_t in, uint8_t *levels, float *factor)
{
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const float least = 1.17549435e-38f * LEVELS;
    for (Py_ssize_t row = 0; row < rows; row++, x += in) {
        __m512i most = _mm512_setzero_si512();
        for (Py_ssize_t at = 0; at < in; at += 16) {
            __mmask16 mask = within(in, at);
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(mask, x + at), magnitude));
        }
        union {
            uint32_t bits;
            float number;
        } largest = {_mm512_reduce_max_epu32(most)};
        factor[row] = (largest.number < least ? least : largest.number) / LEVELS;
        const __m512 each = _mm512_set1_ps(factor[row]), half = _mm512_set1_ps(ZERO + 0.5f);
        for (Py_ssize_t at = 0; at < in; at += 16) {
            __mmask16 mask = within(in, at);
            __mmask16 padded = within((in + 3) / 4 * 4, at);
            __m512 level = _mm512_add_ps(_mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + at), each), half);
            _mm512_mask_cvtepi32_storeu_epi8(levels, padded, _mm512_cvttps_epi32(level));
            levels += in - at >= 16 ? 16 : (in - at + 3) / 4 * 4;
        }
    }
}

/* The sums of one block, for all rows. */
static void add_block(const Product *p, const char *weight, Sums *sums)
{
    memset(sums, 0, p->rows * sizeof(Sums));
    for (Py_ssize_t from = 0; from < p->steps; from += CHUNK_STEPS, weight += CHUNK_STEPS * STEP_BYTES) {
        Py_ssize_t count = p->steps - from < CHUNK_STEPS ? p->steps - from : CHUNK_STEPS;
        for (Py_ssize_t row = 0; row < p->rows; row += TOGETHER) {
            Py_ssize_t rows = p->rows - row < TOGETHER ? p->rows - row : TOGETHER;
            p->add[rows - 1](weight, p->x + row * p->steps + from, p->steps, count, sums + row);
        }
    }
}

/* What one thread does: blocks, until none is left. */
static void work(void *data)
{
    Product *p = data;
    Py_ssize_t blocks = (p->out + OUTPUTS - 1) / OUTPUTS;
    Sums sums[ROWS_MAX];
    for (;;) {
        Py_ssize_t block = atomic_fetch_add(&p->next, p->share), end = block + p->share;
        if (block >= blocks) return;
        for (; block < end && block < blocks; block++) {
            add_block(p, p->weight + block * p->stride * STEP_BYTES, sums);
            p->finish(p, block * OUTPUTS, sums);
        }
    }
}

int multiply(const Map *map, int precision, const char *x, char *y, Py_ssize_t rows, uint8_t *levels, Py_ssize_t threads)
{
    static const Add *const adds[] = {add_floats, add_bfloats, add_bytes};
    static void (*const finishes[])(const Product *, Py_ssize_t, const Sums *) = {finish_floats, finish_bfloats,
                                                                                  finish_bytes};
    const Py_ssize_t together = (Py_ssize_t)1 << precision; /* inputs of a step, of which 16 fill up the layout */
    float factor[ROWS_MAX];
    if (rows < 1 || rows > ROWS_MAX || map->in < 1 || map->out < 1) return 0;
    Product p = {.weight = (char *)map->weight, .x = (uint32_t *)x, .bias = (void *)map->bias, .factor = factor,
                 .scale = (float *)map->scale, .offset = (int32_t *)map->offset, .y = y, .rows = rows, .out = map->out,
                 .steps = (map->in + together - 1) / together, .add = adds[precision], .finish = finishes[precision]};
    p.stride = (p.steps + 15) / 16 * 16;
    if (precision == BYTES) {
        quantise((float *)x, rows, map->in, levels, factor);
        p.x = (uint32_t *)levels;
    }
    Py_ssize_t blocks = (p.out + OUTPUTS - 1) / OUTPUTS;
    threads = threads_for(threads, blocks, blocks * p.stride * STEP_BYTES);
    p.share = threads > 1 && blocks > SHARES * threads ? blocks / (SHARES * threads) : threads > 1 ? 1 : blocks;
    in_threads(work, &p, threads);
    return 1;
}

PyObject *quantise_rows(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[5]; /* x [rows, in], levels [rows, in padded to whole words], factor [rows], rows, in */
    if (!read_numbers(args, given, 5, n)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    quantise((float *)n[0], n[3], n[4], (uint8_t *)n[1], (float *)n[2]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyObject *multiply_rows(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[12]; /* the six of a Map; precision, x, y, rows, levels, threads */
    int fits;
    if (!read_numbers(args, given, 12, n)) return NULL;
    Map map = {n[0], n[1], n[2], n[3], n[4], n[5]};
    Py_BEGIN_ALLOW_THREADS;
    fits = multiply(&map, (int)n[6], (char *)n[7], (char *)n[8], n[9], (uint8_t *)n[10], n[11]);
    Py_END_ALLOW_THREADS;
    if (fits) Py_RETURN_NONE;
    PyErr_Format(PyExc_ValueError, "a product takes 1 to %d rows", ROWS_MAX);
    return NULL;
}

#endif

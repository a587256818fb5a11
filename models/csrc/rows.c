/* What lies between the products of a block, for few rows: at one row these cost calls, not sums, so each is one call. */

#include "kernels.h"

#ifdef HAS_KERNELS

#include <math.h>
#include <stdatomic.h>

#define WITH_BFLOATS WITH(",avx512bf16")

WITH_BFLOATS static inline void write_at(char *to, Py_ssize_t index, __mmask16 mask, int is_bfloat, __m512 numbers)
{
    if (is_bfloat)
        _mm256_mask_storeu_epi16((uint16_t *)to + index, mask, (__m256i)_mm512_cvtneps_pbh(numbers));
    else
        _mm512_mask_storeu_ps((float *)to + index, mask, numbers);
}

/* As bfloat16 would hold them. */
WITH_BFLOATS static inline __m512 rounded(__m512 numbers, int is_bfloat)
{
    if (!is_bfloat) return numbers;
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers)), 16));
}

WITH_BFLOATS void normalise_rows(const Rows *r)
{
    for (Py_ssize_t row = 0; row < r->rows; row++) {
        Py_ssize_t at = row * r->width;
        __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd(); /* many equal roundings add up in float32 */
        for (Py_ssize_t number = 0; number < r->width; number += 16) {
            __m512 x = read_at(r->x, at + number, within(r->width, number), r->is_bfloat);
            __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
            __m512d second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
            low = _mm512_fmadd_pd(first, first, low), high = _mm512_fmadd_pd(second, second, high);
        }
        double mean = _mm512_reduce_add_pd(_mm512_add_pd(low, high)) / (double)r->width;
        __m512 factor = _mm512_set1_ps((float)(1.0 / sqrt(mean + r->eps)));
        for (Py_ssize_t number = 0; number < r->width; number += 16) {
            __mmask16 mask = within(r->width, number);
            __m512 x = read_at(r->x, at + number, mask, r->is_bfloat);
            write_at(r->y, at + number, mask, r->is_bfloat, _mm512_mul_ps(x, factor));
        }
    }
}

/* SiLU of the first half of each row, rounded as it would be on its own, times the second. */
WITH_BFLOATS void gate_rows(const Rows *r)
{
    const __m512 one = _mm512_set1_ps(1.0f);
    for (Py_ssize_t row = 0; row < r->rows; row++)
        for (Py_ssize_t number = 0; number < r->width; number += 16) {
            __mmask16 mask = within(r->width, number);
            Py_ssize_t at = 2 * row * r->width + number;
            __m512 x = read_at(r->x, at, mask, r->is_bfloat), up = read_at(r->x, at + r->width, mask, r->is_bfloat);
            __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
            __m512 opened = rounded(_mm512_div_ps(x, below), r->is_bfloat);
            write_at(r->y, row * r->width + number, mask, r->is_bfloat, _mm512_mul_ps(opened, up));
        }
}

/* Dimension i of a head turns together with i + width / 2; sines of first halves are negative. Each operation is rounded
 * on its own, as torch's are; but the processor's bfloat16 has no subnormal numbers. */
WITH_BFLOATS void turn_rows(const Rows *r)
{
    Py_ssize_t half = r->width / 2;
    for (Py_ssize_t head = 0; head < r->heads; head++)
        for (Py_ssize_t row = 0; row < r->rows; row++)
            for (int second = 0; second < 2; second++)
                for (Py_ssize_t number = 0; number < half; number += 16) {
                    __mmask16 mask = within(half, number);
                    Py_ssize_t own = second * half + number, other = (1 - second) * half + number;
                    Py_ssize_t from = head * r->head_stride + row * r->row_stride, angle = row * r->width + own;
                    __m512 kept = _mm512_mul_ps(read_at(r->x, from + own, mask, r->is_bfloat),
                                                read_at(r->cos, angle, mask, r->is_bfloat));
                    __m512 came = _mm512_mul_ps(read_at(r->x, from + other, mask, r->is_bfloat),
                                                read_at(r->sin, angle, mask, r->is_bfloat));
                    __m512 turned = _mm512_add_ps(rounded(kept, r->is_bfloat), rounded(came, r->is_bfloat));
                    Py_ssize_t to = (head * r->rows + row) * r->width + own;
                    write_at(r->y, to, mask, r->is_bfloat, turned);
                }
}

/* x *= gain, and x += more: [numbers] each. */
WITH_BFLOATS void scale_row(char *x, const char *gain, Py_ssize_t numbers, int is_bfloat)
{
    for (Py_ssize_t at = 0; at < numbers; at += 16) {
        __mmask16 mask = within(numbers, at);
        __m512 scaled = _mm512_mul_ps(read_at(x, at, mask, is_bfloat), read_at(gain, at, mask, is_bfloat));
        write_at(x, at, mask, is_bfloat, scaled);
    }
}

WITH_BFLOATS void add_row(char *x, const char *more, Py_ssize_t numbers, int is_bfloat)
{
    for (Py_ssize_t at = 0; at < numbers; at += 16) {
        __mmask16 mask = within(numbers, at);
        write_at(x, at, mask, is_bfloat, _mm512_add_ps(read_at(x, at, mask, is_bfloat), read_at(more, at, mask, is_bfloat)));
    }
}

typedef struct {
    char *x;
    const char *matrices;
    Py_ssize_t heads, rows, width, head, row;
    int is_bfloat;
    atomic_long next; /* the first head that nobody has taken */
} Heads;

/* `rows` rows of a head, in their place: 64 of their numbers at a time, whose sums stay in registers. */
WITH_BFLOATS static inline __attribute__((always_inline)) void mix_rows(
    const Heads *h, char *x, const char *matrix, const int rows, float wide[TOGETHER][HEAD_WIDTH_MAX])
{
    for (int row = 0; row < rows; row++)
        for (Py_ssize_t at = 0; at < h->width; at += 16)
            _mm512_store_ps(wide[row] + at, read_at(x, row * h->row + at, within(h->width, at), h->is_bfloat));
    for (Py_ssize_t at = 0; at < h->width; at += 16 * LANES) {
        __m512 sums[TOGETHER][LANES];
        __mmask16 masks[LANES];
        UNROLLED
        for (int lane = 0; lane < LANES; lane++) masks[lane] = within(h->width, at + 16 * lane);
        UNROLLED
        for (int row = 0; row < rows; row++)
            UNROLLED
            for (int lane = 0; lane < LANES; lane++) sums[row][lane] = _mm512_setzero_ps();
        for (Py_ssize_t from = 0; from < h->width; from++) {
            __m512 read[LANES];
            UNROLLED
            for (int lane = 0; lane < LANES; lane++)
                read[lane] = read_at(matrix, from * h->width + at + 16 * lane, masks[lane], h->is_bfloat);
            UNROLLED
            for (int row = 0; row < rows; row++)
                UNROLLED
                for (int lane = 0; lane < LANES; lane++)
                    sums[row][lane] = _mm512_fmadd_ps(_mm512_set1_ps(wide[row][from]), read[lane], sums[row][lane]);
        }
        UNROLLED
        for (int row = 0; row < rows; row++)
            UNROLLED
            for (int lane = 0; lane < LANES; lane++)
                write_at(x, row * h->row + at + 16 * lane, masks[lane], h->is_bfloat, sums[row][lane]);
    }
}

/* What one thread does: heads, until none is left. */
WITH_BFLOATS static void mix_some(void *data)
{
    Heads *h = data;
    _Alignas(64) float wide[TOGETHER][HEAD_WIDTH_MAX];
    Py_ssize_t size = h->is_bfloat ? 2 : 4, head;
    while ((head = atomic_fetch_add(&h->next, 1)) < h->heads) {
        const char *matrix = h->matrices + head * h->width * h->width * size;
        Py_ssize_t row = 0;
        for (; row + TOGETHER <= h->rows; row += TOGETHER)
            mix_rows(h, h->x + (head * h->head + row * h->row) * size, matrix, TOGETHER, wide);
        for (; row < h->rows; row++) mix_rows(h, h->x + (head * h->head + row * h->row) * size, matrix, 1, wide);
    }
}

void mix_heads(char *x, const char *matrices, Py_ssize_t heads, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t head,
               Py_ssize_t row, int is_bfloat, Py_ssize_t threads)
{
    Heads h = {x, matrices, heads, rows, width, head, row, is_bfloat, 0};
    in_threads(mix_some, &h, threads_for(threads, heads, heads * width * width * (is_bfloat ? 2 : 4)));
}

/* Do `work`, of so many numbers. */
static PyObject *done(void (*work)(const Rows *), const Rows *r, Py_ssize_t numbers)
{
    PyThreadState *state = numbers > LONG_NUMBERS ? PyEval_SaveThread() : NULL;
    work(r);
    if (state) PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

PyObject *normalise(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[5]; /* x, y, rows, width, whether in bfloat16; then eps */
    if (!read_numbers(args, given - 1, 5, n)) return NULL;
    double eps = PyFloat_AsDouble(args[5]);
    if (eps == -1.0 && PyErr_Occurred()) return NULL;
    Rows r = {.x = (char *)n[0], .y = (char *)n[1], .rows = n[2], .width = n[3], .is_bfloat = (int)n[4],
              .eps = eps};
    return done(normalise_rows, &r, r.rows * r.width);
}

PyObject *gate(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[5]; /* x [rows, 2 width], y, rows, width, whether in bfloat16 */
    if (!read_numbers(args, given, 5, n)) return NULL;
    Rows r = {.x = (char *)n[0], .y = (char *)n[1], .rows = n[2], .width = n[3], .is_bfloat = (int)n[4]};
    return done(gate_rows, &r, 2 * r.rows * r.width);
}

PyObject *turn(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[10]; /* x, cos, sin, y, heads, rows, width, head's stride, row's stride, whether in bfloat16 */
    if (!read_numbers(args, given, 10, n)) return NULL;
    Rows r = {.x = (char *)n[0], .cos = (char *)n[1], .sin = (char *)n[2], .y = (char *)n[3], .heads = n[4],
              .rows = n[5], .width = n[6], .head_stride = n[7], .row_stride = n[8], .is_bfloat = (int)n[9]};
    return done(turn_rows, &r, r.heads * r.rows * r.width);
}

PyObject *mix(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[7]; /* x [heads, rows, width], matrices [heads, width, width], heads, rows, width, whether in bfloat16,
                        threads */
    if (!read_numbers(args, given, 7, n)) return NULL;
    if (n[4] < 1 || n[4] > HEAD_WIDTH_MAX) {
        PyErr_SetString(PyExc_ValueError, "no such heads");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    mix_heads((char *)n[0], (char *)n[1], n[2], n[3], n[4], n[3] * n[4], n[4], (int)n[5], n[6]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

#endif

/* What lies between the products of a block, for few rows: at one row these cost calls, not sums, so each is one call. */

#include "kernels.h"

#ifdef HAS_KERNELS

#include <math.h>

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

/* x [width] times a matrix [width, width], in its place. */
WITH_BFLOATS void mix_row(char *x, const char *matrix, Py_ssize_t width, int is_bfloat)
{
    _Alignas(64) float wide[HEAD_WIDTH_MAX];
    for (Py_ssize_t at = 0; at < width; at += 16)
        _mm512_store_ps(wide + at, read_at(x, at, within(width, at), is_bfloat));
    for (Py_ssize_t at = 0; at < width; at += 16) {
        __mmask16 mask = within(width, at);
        __m512 sum = _mm512_setzero_ps();
        for (Py_ssize_t from = 0; from < width; from++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(wide[from]), read_at(matrix, from * width + at, mask, is_bfloat), sum);
        write_at(x, at, mask, is_bfloat, sum);
    }
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

PyObject *mix_heads(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[6]; /* x [heads, rows, width], matrices [heads, width, width], heads, rows, width, whether in bfloat16 */
    if (!read_numbers(args, given, 6, n)) return NULL;
    if (n[4] < 1 || n[4] > HEAD_WIDTH_MAX) {
        PyErr_SetString(PyExc_ValueError, "no such heads");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    Py_ssize_t bytes = n[4] * (n[5] ? 2 : 4);
    for (Py_ssize_t head = 0; head < n[2]; head++)
        for (Py_ssize_t row = 0; row < n[3]; row++)
            mix_row((char *)n[0] + (head * n[3] + row) * bytes, (char *)n[1] + head * n[4] * bytes, n[4], (int)n[5]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

#endif

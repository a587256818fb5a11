/* Activations in 8 bits as they travel (models/blockwise.py): for each row bfloat16 factors of its blocks; behind those of all rows the numbers of all rows. One row is a dozen operations of torch's otherwise, at both ends of every hop. */

#include "kernels.h"

#ifdef HAS_KERNELS

#include <string.h>

#define BLOCK (16 * LANES) /* numbers of a factor */
#define LEVELS 127.0f

static Py_ssize_t blocks_of(Py_ssize_t width) { return (width + BLOCK - 1) / BLOCK; }

static inline float widened(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

/* The nearest bfloat16, of two the even one; an infinity or a NaN stays one. */
static inline uint16_t halved(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if (number != number) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* One block: its factor, and `count` numbers of it. */
WITH() static uint16_t shorten_block(const char *x, Py_ssize_t at, Py_ssize_t count, int is_bfloat, int8_t *levels)
{
    __m512 numbers[LANES], largest = _mm512_setzero_ps();
    __mmask16 odd = 0;
    UNROLLED
    for (int lane = 0; lane < LANES; lane++) {
        numbers[lane] = read_at(x, at + 16 * lane, within(count, 16 * lane), is_bfloat);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(numbers[lane]));
        odd |= _mm512_cmp_ps_mask(numbers[lane], numbers[lane], _CMP_UNORD_Q);
    }
    uint16_t factor = odd ? 0x7fc0 : halved(_mm512_reduce_max_ps(largest) / LEVELS);
    __m512 divisor = _mm512_set1_ps(factor ? widened(factor) : 1.0f);
    UNROLLED
    for (int lane = 0; lane < LANES; lane++) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(numbers[lane], divisor));
        whole = _mm512_max_epi32(whole, _mm512_set1_epi32(-(int)LEVELS));
        _mm_mask_storeu_epi8(levels + 16 * lane, within(count, 16 * lane), _mm512_cvtsepi32_epi8(whole));
    }
    return factor;
}

static void shorten_rows(const char *x, char *to, Py_ssize_t rows, Py_ssize_t width, int is_bfloat)
{
    Py_ssize_t blocks = blocks_of(width);
    int8_t *levels = (int8_t *)to + 2 * rows * blocks;
    for (Py_ssize_t row = 0; row < rows; row++)
        for (Py_ssize_t block = 0; block < blocks; block++) {
            Py_ssize_t at = row * width + block * BLOCK, left = width - block * BLOCK;
            uint16_t factor = shorten_block(x, at, left < BLOCK ? left : BLOCK, is_bfloat, levels + at);
            memcpy(to + 2 * (row * blocks + block), &factor, 2);
        }
}

/* `rows` rows whose first factor and number are at these places. */
WITH() static void lengthen_rows(const char *factors, const char *levels, float *y, Py_ssize_t rows, Py_ssize_t width)
{
    Py_ssize_t blocks = blocks_of(width);
    for (Py_ssize_t row = 0; row < rows; row++)
        for (Py_ssize_t from = 0; from < width; from += 16) {
            uint16_t half;
            memcpy(&half, factors + 2 * (row * blocks + from / BLOCK), 2);
            __mmask16 mask = within(width, from);
            Py_ssize_t at = row * width + from;
            __m512 whole = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, levels + at)));
            _mm512_mask_storeu_ps(y + at, mask, _mm512_mul_ps(whole, _mm512_set1_ps(widened(half))));
        }
}

PyObject *shorten(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[4]; /* x [rows, width], rows, width, whether in bfloat16 */
    if (!read_numbers(args, given, 4, n)) return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, n[1] * (2 * blocks_of(n[2]) + n[2]));
    if (!bytes) return NULL;
    char *to = PyBytes_AsString(bytes);
    PyThreadState *state = n[1] * n[2] > LONG_NUMBERS ? PyEval_SaveThread() : NULL;
    shorten_rows((const char *)n[0], to, n[1], n[2], (int)n[3]);
    if (state) PyEval_RestoreThread(state);
    return bytes;
}

PyObject *lengthen(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[5]; /* y [count, width] float32, rows of the bytes, width, the first that is read, count; then the bytes */
    Py_buffer data;
    if (!read_numbers(args, given - 1, 5, n) || PyObject_GetBuffer(args[5], &data, PyBUF_SIMPLE) < 0) return NULL;
    Py_ssize_t rows = n[1], width = n[2], start = n[3], count = n[4], blocks = blocks_of(width);
    int fits = 0 <= start && 0 <= count && start + count <= rows && data.len == rows * (2 * blocks + width);
    if (fits) {
        const char *factors = data.buf, *levels = factors + 2 * rows * blocks;
        PyThreadState *state = count * width > LONG_NUMBERS ? PyEval_SaveThread() : NULL;
        lengthen_rows(factors + 2 * start * blocks, levels + start * width, (float *)n[0], count, width);
        if (state) PyEval_RestoreThread(state);
    }
    PyBuffer_Release(&data);
    if (!fits) return PyErr_Format(PyExc_ValueError, "%zd bytes are not %zd rows of %zd numbers", data.len, rows, width);
    Py_RETURN_NONE;
}

#endif

/* What the kernels share. They exist for x86-64 with AVX-512 under Linux; elsewhere the module is empty. */

#pragma once

#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#if defined(__x86_64__) && defined(__linux__)
#define HAS_KERNELS 1

#include <immintrin.h>
#include <stdint.h>

#define WITH(...) __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" __VA_ARGS__)))
#define UNROLLED _Pragma("GCC unroll 6") /* else arrays of registers would lie in memory */
#define ROWS_MAX 64                      /* of a product: their sums lie on the stack */
#define TOGETHER 6                       /* rows whose sums stay in registers: 24 of 32 */
#define LANES 4                          /* registers that a row's sums take: 64 numbers */

/* Which of 16 numbers from `number` on lie before `width`. */
static inline __mmask16 within(Py_ssize_t width, Py_ssize_t number)
{
    Py_ssize_t left = width - number;
    return left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
}

/* 16 numbers of `from`, or as many as the mask lets through, in float32. */
WITH() static inline __attribute__((always_inline)) __m512 read_at(
    const char *from, Py_ssize_t index, __mmask16 mask, const int is_bfloat)
{
    if (!is_bfloat) return _mm512_maskz_loadu_ps(mask, (const float *)from + index);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* e^x, right to some units in the last place; a NaN stays one: of it and a number, the second is taken. */
WITH() static inline __m512 exponential(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-100.0f), _mm512_min_ps(_mm512_set1_ps(100.0f), x));
    __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693145752f), x);
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(1.42860677e-6f), rest);
    __m512 sum = _mm512_set1_ps(1.98756915e-4f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.39819995e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.33345205e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.16657962e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.66666657e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(sum, whole);
}

/* Do `work(data)` in so many of torch's own threads at once. */
void in_threads(void (*work)(void *), void *data, Py_ssize_t threads);

/* Whether `threads` are worth waking for `parts` that read so many bytes: all of them, or one. OpenMP ends and starts
 * threads whenever a team has another size than the one before. */
Py_ssize_t threads_for(Py_ssize_t threads, Py_ssize_t parts, Py_ssize_t bytes);

/* For calls that last: other Python threads go on meanwhile. Short ones would wait longer for their turn than they take. */
#define LONG_NUMBERS (1 << 17)

/* Addresses and sizes, all whole numbers; false with an error set. */
int read_numbers(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, Py_ssize_t *numbers);

/* Numbers in rows, as bfloat16 or float32. What each function takes of it, rows.c says. */
typedef struct {
    const char *x, *cos, *sin;
    char *y;
    Py_ssize_t rows, width, heads, head_stride, row_stride;
    double eps;
    int is_bfloat;
} Rows;

void normalise_rows(const Rows *);
void gate_rows(const Rows *);
void turn_rows(const Rows *);
void scale_row(char *x, const char *gain, Py_ssize_t numbers, int is_bfloat);
void add_row(char *x, const char *more, Py_ssize_t numbers, int is_bfloat);

/* Rows of heads, from one head and from one row to the next in numbers, each head times its matrix [width, width]. */
void mix_heads(char *x, const char *matrices, Py_ssize_t heads, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t head,
               Py_ssize_t row, int is_bfloat, Py_ssize_t threads);

typedef struct {
    const char *queries, *keys, *values; /* [heads, rows, width], and twice [key heads, tokens, width] */
    const int64_t *reads;  /* [rows, 3]: a row of the queries, its first place, and the one after its last */
    const int64_t *places; /* [., 2]: the first of some tokens, and how many; a row's in order */
    char *answer;          /* [rows, heads, width] */
    Py_ssize_t rows, heads, key_heads, width;
    Py_ssize_t query_head, head, token; /* from one to the next, in numbers */
    Py_ssize_t bytes;                   /* that are read */
    int is_bfloat;
} Attention;

#define HEAD_WIDTH_MAX 512

/* False, and nothing done, where heads do not fit. */
int attend_rows(const Attention *, Py_ssize_t threads);

/* `count` steps more for 1 to TOGETHER rows of x [., steps], whose sums of 64 outputs are given. A step is 256 bytes: what
 * 64 outputs take of one input in float32, of two in bfloat16; and of a row of x one 32-bit word. */
typedef __m512i Sums[LANES];
typedef void (*Add)(const char *weight, const uint32_t *x, Py_ssize_t steps, Py_ssize_t count, Sums *sums);
extern const Add add_floats[TOGETHER], add_bfloats[TOGETHER];

/* A weight [out, in] that oneDNN has packed, and what is added to its products. int8 has a `scale` for each output, and
 * as `offset` 128 times the sum of its levels. */
typedef struct {
    int64_t weight, bias, scale, offset, in, out;
} Map;

enum { FLOATS, BFLOATS, BYTES }; /* precisions of weights */

/* x [rows, in] times the weight, to y [rows, out], in the weight's precision, int8 in float32; `levels`: int8's scratch,
 * [rows, in + 3]. False, and nothing done, unless there are 1 to ROWS_MAX rows. */
int multiply(const Map *, int precision, const char *x, char *y, Py_ssize_t rows, uint8_t *levels, Py_ssize_t threads);

PyObject *quantise_rows(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *multiply_rows(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *attend(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *attend_together(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *normalise(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *gate(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *turn(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *mix(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *run_blocks(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *shorten(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *lengthen(PyObject *, PyObject *const *, Py_ssize_t);

#endif

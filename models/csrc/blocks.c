/* A few rows through consecutive blocks in one call: the products, and what lies between them, one after another.
 *
 * Between two calls of a kernel lie as many of Python's and of torch's, on caches that the weights have just emptied. Here
 * are none, and other Python threads go on for the whole length of a forward. Each step is what the kernel of its own does
 * (products.c, attention.c, rows.c).
 */

#include "kernels.h"

#ifdef HAS_KERNELS

#include <stdlib.h>
#include <string.h>

/* What stays of a block: the whole numbers of Block.described (models/blocks.py), in this order, and its kind. */
typedef struct {
    Map qkv, o, gate_up, down;
    int64_t attn_gain, mlp_gain;   /* [hidden], or none */
    int64_t head_gain, head_post;  /* [heads + key heads, width], and [., width, width]; or none */
    int64_t heads, key_heads, width;
    int64_t qk_norm; /* whether heads of queries and keys have one */
    double eps;
    int64_t kind; /* of what follows last, which is the same for most blocks */
} Block;

/* Where its keys and values lie (Kvs in models/pages.py): from one head, and from one token, to the next in numbers. */
typedef struct {
    int64_t keys, values, head, token;
} Cache;

/* What is another in each call, of each kind (models/stack.py). */
typedef struct {
    int64_t cos, sin;      /* [rows, width] */
    int64_t reads, places; /* as Attention has them, of all rows in order */
    int64_t looked;        /* tokens of all places */
} Here;

typedef struct {
    Py_ssize_t rows, hidden, threads;
    const int64_t *tokens; /* [rows], where each row's keys and values go */
    int precision, is_bfloat;
    size_t size;                                   /* bytes of a number */
    char *x, *normed, *heads, *turned, *both, *part; /* x [rows, hidden]: the hidden states, replaced block by block */
    uint8_t *levels;
} Run;

static void normalise_hidden(const Run *r, const Block *b, int64_t gain)
{
    Rows rows = {.x = r->x, .y = r->normed, .rows = r->rows, .width = r->hidden, .eps = b->eps, .is_bfloat = r->is_bfloat};
    normalise_rows(&rows);
    if (gain)
        for (Py_ssize_t row = 0; row < r->rows; row++)
            scale_row(r->normed + row * r->hidden * r->size, (char *)gain, r->hidden, r->is_bfloat);
}

/* Queries and keys after the norm of models that have one for each head. */
static void normalise_heads(const Run *r, const Block *b)
{
    Py_ssize_t turning = b->heads + b->key_heads, whole = (turning + b->key_heads) * b->width;
    for (Py_ssize_t row = 0; row < r->rows; row++) {
        char *heads = r->heads + row * whole * r->size;
        Rows rows = {.x = heads, .y = heads, .rows = turning, .width = b->width, .eps = b->eps, .is_bfloat = r->is_bfloat};
        normalise_rows(&rows);
        if (b->head_gain) scale_row(heads, (char *)b->head_gain, turning * b->width, r->is_bfloat);
    }
    if (b->head_post)
        mix_heads(r->heads, (char *)b->head_post, turning, r->rows, b->width, b->width, whole, r->is_bfloat, r->threads);
}

static void keep(const Run *r, const Block *b, const Cache *c)
{
    Py_ssize_t turning = b->heads + b->key_heads, whole = turning + b->key_heads;
    size_t bytes = b->width * r->size;
    for (Py_ssize_t head = 0; head < b->key_heads; head++)
        for (Py_ssize_t row = 0; row < r->rows; row++) {
            size_t at = (head * c->head + r->tokens[row] * c->token) * r->size;
            memcpy((char *)c->keys + at, r->turned + ((b->heads + head) * r->rows + row) * bytes, bytes);
            memcpy((char *)c->values + at, r->heads + (row * whole + turning + head) * bytes, bytes);
        }
}

static void run_block(const Run *r, const Block *b, const Cache *c, const Here *h)
{
    Py_ssize_t turning = b->heads + b->key_heads, whole = (turning + b->key_heads) * b->width;
    normalise_hidden(r, b, b->attn_gain);
    multiply(&b->qkv, r->precision, r->normed, r->heads, r->rows, r->levels, r->threads);
    if (b->qk_norm) normalise_heads(r, b);
    Rows turn = {.x = r->heads, .cos = (char *)h->cos, .sin = (char *)h->sin, .y = r->turned, .heads = turning,
                 .rows = r->rows, .width = b->width, .head_stride = b->width, .row_stride = whole,
                 .is_bfloat = r->is_bfloat};
    turn_rows(&turn);
    keep(r, b, c);
    Attention attention = {r->turned, (char *)c->keys, (char *)c->values, (int64_t *)h->reads, (int64_t *)h->places,
                           r->heads, r->rows, b->heads, b->key_heads, b->width, r->rows * b->width, c->head, c->token,
                           2 * h->looked * b->key_heads * b->width * r->size, r->is_bfloat};
    attend_rows(&attention, r->threads);
    multiply(&b->o, r->precision, r->heads, r->part, r->rows, r->levels, r->threads);
    add_row(r->x, r->part, r->rows * r->hidden, r->is_bfloat);
    normalise_hidden(r, b, b->mlp_gain);
    multiply(&b->gate_up, r->precision, r->normed, r->both, r->rows, r->levels, r->threads);
    Rows gate = {.x = r->both, .y = r->heads, .rows = r->rows, .width = b->down.in, .is_bfloat = r->is_bfloat};
    gate_rows(&gate);
    multiply(&b->down, r->precision, r->heads, r->part, r->rows, r->levels, r->threads);
    add_row(r->x, r->part, r->rows * r->hidden, r->is_bfloat);
}

static int fits(const Run *r, const Block *b)
{
    Py_ssize_t whole = (b->heads + 2 * b->key_heads) * b->width;
    return b->key_heads > 0 && b->heads > 0 && b->heads % b->key_heads == 0 && b->width > 0 && b->width % 2 == 0 &&
           b->width <= HEAD_WIDTH_MAX && b->qkv.in == r->hidden && b->qkv.out == whole &&
           b->o.in == b->heads * b->width && b->o.out == r->hidden && b->gate_up.in == r->hidden && b->down.in > 0 &&
           b->gate_up.out == 2 * b->down.in && b->down.out == r->hidden;
}

/* Room for what lies between the products, of the block that needs most: false when there is none. */
static void *make_room(Run *r, const Block *blocks, Py_ssize_t count)
{
    Py_ssize_t heads = 0, turned = 0, both = 0;
    for (const Block *b = blocks; b < blocks + count; b++) {
        Py_ssize_t turning = (b->heads + b->key_heads) * b->width, wide = b->qkv.out > b->down.in ? b->qkv.out : b->down.in;
        heads = wide > heads ? wide : heads; /* also what attention and gate give */
        turned = turning > turned ? turning : turned;
        both = b->gate_up.out > both ? b->gate_up.out : both;
    }
    Py_ssize_t numbers[] = {r->hidden, heads, turned, both, r->hidden};
    char **parts[] = {&r->normed, &r->heads, &r->turned, &r->both, &r->part}, *room;
    Py_ssize_t widest = heads > r->hidden ? heads : r->hidden;
    size_t bytes = r->rows * (widest + 3), at = 0; /* of int8's levels */
    for (int part = 0; part < 5; part++) bytes += (r->rows * numbers[part] * r->size + 63) / 64 * 64;
    if (posix_memalign((void **)&room, 64, bytes)) return NULL;
    for (int part = 0; part < 5; part++) {
        *parts[part] = room + at;
        at += (r->rows * numbers[part] * r->size + 63) / 64 * 64;
    }
    r->levels = (uint8_t *)room + at;
    return room;
}

PyObject *run_blocks(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    Py_ssize_t n[11]; /* Blocks, Caches, Heres, how many blocks; tokens, x, y, rows, hidden, precision, threads */
    if (!read_numbers(args, given, 11, n)) return NULL;
    const Block *blocks = (Block *)n[0];
    const Cache *caches = (Cache *)n[1];
    const Here *heres = (Here *)n[2];
    Run r = {.rows = n[7], .hidden = n[8], .threads = n[10], .tokens = (int64_t *)n[4], .precision = (int)n[9],
             .is_bfloat = n[9] == BFLOATS, .size = n[9] == BFLOATS ? 2 : 4, .x = (char *)n[6]};
    int fit = r.rows >= 1 && r.rows <= ROWS_MAX && r.hidden > 0 && r.precision >= FLOATS && r.precision <= BYTES;
    for (Py_ssize_t block = 0; block < n[3]; block++) fit = fit && fits(&r, blocks + block);
    if (!fit) {
        PyErr_SetString(PyExc_ValueError, "no such blocks");
        return NULL;
    }
    void *room = make_room(&r, blocks, n[3]);
    if (!room) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS;
    memcpy(r.x, (char *)n[5], r.rows * r.hidden * r.size);
    for (Py_ssize_t block = 0; block < n[3]; block++)
        run_block(&r, blocks + block, caches + block, heres + blocks[block].kind);
    free(room);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

#endif

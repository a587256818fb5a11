/* Attention of many rows of one sequence, as of a prompt: what they look at is laid out once for all of them.
 *
 * 64 tokens at a time ("a tile"): keys so that scores are a product of few rows, and values so that mixing them is another
 * (products.c), each row's scores relative to its largest so far in between. In bfloat16 the weights of values are rounded
 * to it, as torch's are; sums are in float32.
 *
 * Invariant: tiles begin at multiples of 64 of the sequence, and what a row must not see adds exact zeros where it is
 * finite, so a row's bits depend neither on the rows beside it, nor on how its prompt is cut, nor on where keys lie, nor on
 * threads.
 */

#include "kernels.h"

#ifdef HAS_KERNELS

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define TILE 64   /* tokens */
#define STEP 64   /* words */
#define ROWS 128  /* of a part, at most: for so many a tile is laid out */
#define ROWS_MIN 32 /* where there are threads for more parts */
#define HEADS 8   /* query heads of a part, at most */

typedef struct {
    const char *queries, *keys, *values; /* [heads, ., width], and twice [key heads, tokens, width] */
    const int64_t *places;               /* [., 2]: the first of some tokens, and how many; in order */
    char *answer;                        /* [rows, heads, width] */
    Py_ssize_t first, rows;              /* of the queries */
    Py_ssize_t start, length, window;    /* the sequence's tokens that are there; how far a row looks back, or 0 */
    Py_ssize_t heads, key_heads, width;
    Py_ssize_t query_head, head, token; /* from one to the next, in numbers */
    int is_bfloat;
    Py_ssize_t size, blocks;             /* bytes of a number; of 64 numbers that a head has */
    Py_ssize_t piece;                    /* rows of a part */
    char *rooms;
    Py_ssize_t room_bytes;
    atomic_long next, taken; /* the first part that nobody has taken, and room */
} Prompt;

/* What a thread has for a part. Rows of `mixed` are padded to whole blocks. */
typedef struct {
    float *mixed;                        /* [HEADS ROWS, blocks, 64] */
    float largest[HEADS * ROWS], total[HEADS * ROWS];
    uint32_t keys[HEAD_WIDTH_MAX * STEP]; /* [words of a head, 64 tokens] */
    uint32_t values[HEAD_WIDTH_MAX * TILE]; /* [blocks, steps, 64 numbers] */
    uint32_t weights[TOGETHER * TILE];
} Room;

/* Query heads [query, query + heads), which share a head of keys, and rows [row, row + rows). */
typedef struct {
    Py_ssize_t query, heads, row, rows;
} Part;

/* The token that a row stands at. */
static inline Py_ssize_t position(const Prompt *p, Py_ssize_t row) { return p->start + p->length - p->rows + row; }

/* The first token that it sees. */
static inline Py_ssize_t seen_from(const Prompt *p, Py_ssize_t row)
{
    Py_ssize_t from = p->window ? position(p, row) - p->window + 1 : 0;
    return from > p->start ? from : p->start;
}

static inline Py_ssize_t least(Py_ssize_t a, Py_ssize_t b) { return a < b ? a : b; }

/* Two tokens' values beside each other, as bfloat16's products want them; the second may be absent. */
WITH() static void interleave(const uint16_t *one, const uint16_t *two, uint32_t *to, Py_ssize_t width)
{
    for (Py_ssize_t at = 0; at < width; at += 16) {
        __mmask16 mask = within(width, at);
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, one + at));
        if (two)
            low = _mm512_or_si512(
                low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, two + at)), 16));
        _mm512_mask_storeu_epi32(to + at, mask, low);
    }
}

/* Where a tile's tokens begin: a place, and its first token. */
typedef struct {
    const int64_t *place;
    Py_ssize_t token;
} Mark;

/* The tile at `tile`: values are zeros where no token is; keys are what they were, for nobody sees their scores. `mark` is
 * at or before it, and comes to lie there: tiles go forward. */
static void lay_out(const Prompt *p, Room *room, Py_ssize_t tile, Py_ssize_t key_head, Mark *mark)
{
    const char *rows[TILE] = {0};
    const Py_ssize_t across = p->values - p->keys;
    while (mark->token + mark->place[1] <= tile) mark->token += mark->place[1], mark->place += 2;
    Py_ssize_t token = mark->token, end = least(p->start + p->length, tile + TILE);
    for (const int64_t *place = mark->place; token < end; token += place[1], place += 2)
        for (Py_ssize_t at = token > tile ? token : tile; at < token + place[1] && at < end; at++)
            rows[at - tile] = p->keys + (key_head * p->head + (place[0] + at - token) * p->token) * p->size;
    const Py_ssize_t words = p->width * p->size / 4, steps = TILE * p->size / 4;
    memset(room->values, 0, p->blocks * steps * STEP * sizeof(uint32_t));
    for (Py_ssize_t key = 0; key < TILE; key++) {
        if (!rows[key]) continue;
        const uint32_t *from = (const uint32_t *)rows[key];
        for (Py_ssize_t word = 0; word < words; word++) room->keys[word * STEP + key] = from[word];
    }
    for (Py_ssize_t block = 0; block < p->blocks; block++)
        for (Py_ssize_t key = 0; key < TILE; key += p->is_bfloat ? 2 : 1) {
            Py_ssize_t skip = 64 * block * p->size, width = least(64, p->width - 64 * block);
            uint32_t *to = room->values + (block * steps + (p->is_bfloat ? key / 2 : key)) * STEP;
            const char *one = rows[key], *two = p->is_bfloat ? rows[key + 1] : NULL;
            static const uint16_t zeros[64];
            if (!p->is_bfloat && one)
                memcpy(to, one + across + skip, width * sizeof(float));
            else if (one || two)
                interleave(one ? (uint16_t *)(one + across + skip) : zeros, two ? (uint16_t *)(two + across + skip) : NULL,
                           to, width);
        }
}

/* Scores of a row, of which it sees [from, to), to the weights of values; what came before fades by what is returned. */
WITH(",avx512bf16") static float weigh(
    const Prompt *p, const Sums scores, Py_ssize_t from, Py_ssize_t to, float *largest, float *total, uint32_t *weights)
{
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)p->width));
    __m512 most = _mm512_set1_ps(*largest), sum = _mm512_setzero_ps(), scaled[LANES];
    __mmask16 masks[LANES];
    UNROLLED
    for (int lane = 0; lane < LANES; lane++) {
        masks[lane] = within(to, 16 * lane) & ~within(from, 16 * lane);
        scaled[lane] = _mm512_mul_ps(_mm512_castsi512_ps(scores[lane]), scale);
        most = _mm512_mask_max_ps(most, masks[lane], most, scaled[lane]);
    }
    float now = _mm512_reduce_max_ps(most), fade = 1.0f;
    const __m512 above = _mm512_set1_ps(now);
    UNROLLED
    for (int lane = 0; lane < LANES; lane++) {
        __m512 weight = _mm512_maskz_mov_ps(masks[lane], exponential(_mm512_sub_ps(scaled[lane], above)));
        sum = _mm512_add_ps(sum, weight);
        if (p->is_bfloat)
            _mm256_storeu_si256((__m256i *)(weights + 8 * lane), (__m256i)_mm512_cvtneps_pbh(weight));
        else
            _mm512_storeu_ps(weights + 16 * lane, weight);
    }
    if (now != *largest) fade = *total > 0 ? _mm512_cvtss_f32(exponential(_mm512_set1_ps(*largest - now))) : 0.0f;
    *largest = now;
    *total = *total * fade + _mm512_reduce_add_ps(sum);
    return fade;
}

/* A tile, for up to TOGETHER rows of a query head from `row` on. */
WITH() static void take_tile(const Prompt *p, Room *room, Py_ssize_t tile, Py_ssize_t query, Py_ssize_t row, Py_ssize_t rows,
                             Py_ssize_t slot)
{
    const Add *add = p->is_bfloat ? add_bfloats : add_floats;
    const Py_ssize_t words = p->width * p->size / 4, steps = TILE * p->size / 4;
    Sums sums[TOGETHER];
    float fades[TOGETHER];
    memset(sums, 0, sizeof sums);
    const char *queries = p->queries + (query * p->query_head + (p->first + row) * p->width) * p->size;
    add[rows - 1]((char *)room->keys, (const uint32_t *)queries, words, words, sums);
    for (Py_ssize_t each = 0; each < rows; each++) {
        Py_ssize_t from = seen_from(p, row + each) - tile, to = position(p, row + each) + 1 - tile;
        fades[each] = weigh(p, sums[each], from, to, room->largest + slot + each, room->total + slot + each,
                            room->weights + each * steps);
    }
    for (Py_ssize_t block = 0; block < p->blocks; block++) {
        for (Py_ssize_t each = 0; each < rows; each++) {
            const float *mixed = room->mixed + ((slot + each) * p->blocks + block) * 64;
            for (int lane = 0; lane < LANES; lane++)
                sums[each][lane] = _mm512_castps_si512(
                    _mm512_mul_ps(_mm512_load_ps(mixed + 16 * lane), _mm512_set1_ps(fades[each])));
        }
        add[rows - 1]((char *)(room->values + block * steps * STEP), room->weights, steps, steps, sums);
        for (Py_ssize_t each = 0; each < rows; each++) {
            float *mixed = room->mixed + ((slot + each) * p->blocks + block) * 64;
            for (int lane = 0; lane < LANES; lane++)
                _mm512_store_ps(mixed + 16 * lane, _mm512_castsi512_ps(sums[each][lane]));
        }
    }
}

WITH(",avx512bf16") static void give(const Prompt *p, const Room *room, const Part *part)
{
    for (Py_ssize_t slot = 0; slot < part->heads * part->rows; slot++) {
        Py_ssize_t to = ((part->row + slot % part->rows) * p->heads + part->query + slot / part->rows) * p->width;
        const __m512 total = _mm512_set1_ps(room->total[slot]);
        for (Py_ssize_t at = 0; at < p->width; at += 16) {
            __m512 mixed = _mm512_div_ps(_mm512_load_ps(room->mixed + slot * p->blocks * 64 + at), total);
            __mmask16 mask = within(p->width, at);
            if (p->is_bfloat)
                _mm256_mask_storeu_epi16((uint16_t *)p->answer + to + at, mask, (__m256i)_mm512_cvtneps_pbh(mixed));
            else
                _mm512_mask_storeu_ps((float *)p->answer + to + at, mask, mixed);
        }
    }
}

static void attend_part(const Prompt *p, Room *room, const Part *part)
{
    Py_ssize_t slots = part->heads * part->rows, last = part->row + part->rows - 1;
    memset(room->mixed, 0, slots * p->blocks * 64 * sizeof(float));
    for (Py_ssize_t slot = 0; slot < slots; slot++)
        room->largest[slot] = -FLT_MAX, room->total[slot] = 0; /* finite: the first scores may all be -inf */
    Mark mark = {p->places, p->start};
    for (Py_ssize_t tile = seen_from(p, part->row) / TILE * TILE; tile <= position(p, last); tile += TILE) {
        lay_out(p, room, tile, part->query / (p->heads / p->key_heads), &mark);
        for (Py_ssize_t head = 0; head < part->heads; head++)
            for (Py_ssize_t row = 0; row < part->rows; row += TOGETHER) {
                Py_ssize_t rows = least(TOGETHER, part->rows - row), from = part->row + row;
                if (tile > position(p, from + rows - 1) || tile + TILE <= seen_from(p, from)) continue;
                take_tile(p, room, tile, part->query + head, from, rows, head * part->rows + row);
            }
    }
    give(p, room, part);
}

static Py_ssize_t parts_of(Py_ssize_t whole, Py_ssize_t part) { return (whole + part - 1) / part; }

/* What one thread does: parts, until none is left. Those of the last rows, which see most, come first. */
static void work(void *data)
{
    Prompt *p = data;
    Py_ssize_t group = p->heads / p->key_heads, bunches = parts_of(group, HEADS), pieces = parts_of(p->rows, p->piece);
    char *own = p->rooms + atomic_fetch_add(&p->taken, 1) * p->room_bytes;
    Room *room = (Room *)own;
    room->mixed = (float *)(own + (sizeof(Room) + 63) / 64 * 64);
    for (;;) {
        Py_ssize_t index = atomic_fetch_add(&p->next, 1), piece = pieces - 1 - index / (bunches * p->key_heads);
        if (piece < 0) return;
        Py_ssize_t bunch = index % bunches, query = index / bunches % p->key_heads * group + bunch * HEADS;
        Part part = {query, least(HEADS, group - bunch * HEADS), piece * p->piece,
                     least(p->piece, p->rows - piece * p->piece)};
        attend_part(p, room, &part);
    }
}

PyObject *attend_together(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    /* queries, keys, values, places, answer, first row, rows, start, length, window, heads, key heads, width, query head's
     * stride, head's stride, token's stride, whether in bfloat16, threads */
    Py_ssize_t n[18];
    if (!read_numbers(args, given, 18, n)) return NULL;
    Prompt p = {.queries = (char *)n[0], .keys = (char *)n[1], .values = (char *)n[2], .places = (int64_t *)n[3],
                .answer = (char *)n[4], .first = n[5], .rows = n[6], .start = n[7], .length = n[8], .window = n[9],
                .heads = n[10], .key_heads = n[11], .width = n[12], .query_head = n[13], .head = n[14], .token = n[15],
                .is_bfloat = (int)n[16], .size = n[16] ? 2 : 4, .blocks = (n[12] + 63) / 64};
    if (p.rows < 1 || p.rows > p.length || p.key_heads < 1 || p.heads < 1 || p.heads % p.key_heads || p.width < 2 ||
        p.width % 2 || p.width > HEAD_WIDTH_MAX || p.start < 0 || p.window < 0) {
        PyErr_SetString(PyExc_ValueError, "no such attention");
        return NULL;
    }
    Py_ssize_t bunches = p.key_heads * parts_of(p.heads / p.key_heads, HEADS);
    for (p.piece = ROWS; n[17] > 1 && p.piece > ROWS_MIN && bunches * parts_of(p.rows, p.piece) < 2 * n[17];)
        p.piece /= 2;
    Py_ssize_t threads = threads_for(n[17], bunches * parts_of(p.rows, p.piece), p.rows * p.length * p.heads);
    p.room_bytes = ((sizeof(Room) + 63) / 64 + HEADS * ROWS * p.blocks * 4) * 64;
    if (posix_memalign((void **)&p.rooms, 64, threads * p.room_bytes)) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS;
    in_threads(work, &p, threads);
    free(p.rooms);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

#endif

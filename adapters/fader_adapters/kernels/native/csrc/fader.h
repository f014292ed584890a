/* C ABI of Fader's CPU kernels: raw pointers and sizes in, status codes out. Knows no torch, no Python, no files.
 *
 * Status: 0 = done, < 0 = a FADER_E_* code, nothing written. Every call is safe from several threads.
 * Dtypes: FADER_F32, FADER_BF16, FADER_F16 (F16 only as input of the quantiser).
 * `nt` is the number of OpenMP threads the call may use; results never depend on it.
 * Row results never depend on the other rows of the call: each has one fixed order of additions.
 */
#ifndef FADER_H
#define FADER_H
#include <stdint.h>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

#define FADER_ABI 14
enum { FADER_F32 = 0, FADER_BF16 = 1, FADER_F16 = 2 };
enum { FADER_NF4 = 0, FADER_PLAIN = 1 };
enum { FADER_SCALAR = 0, FADER_AVX2 = 1, FADER_AVX512 = 2, FADER_AVX512_BF16 = 3 };
enum {
    FADER_E_ARG = -1,     /* a size, pointer or dtype that the kernel does not take */
    FADER_E_SCRATCH = -2, /* scratch too small: *need holds the bytes to pass */
    FADER_E_BOUNDS = -3,  /* an offset, slot, row or block number outside its table */
    FADER_E_ISA = -4      /* this machine or build does not have that level */
};

int fader_abi(void);
int fader_best_isa(void);     /* highest level of this machine that this build holds */
int fader_isa(void);          /* level in use */
int fader_set_isa(int level); /* level >= 0, or -1 for the best one */

/* ---- NF4 weights -----------------------------------------------------------------------------
 * bitsandbytes' bytes:  packed [n*k/2], high nibble = even element; absmax fp32 [n*k/64].
 * Panels: 32 columns each, P = ceil(n/32):
 *   panels [P][k/2][32]: byte 2j+b of pair i holds element 2i+b of columns j (low nibble), j+16 (high)
 *   scales [P][k/64][32] fp32
 * Columns past n decode to zero. 0.5625 byte per weight. k % 64 == 0. */
int fader_repack(int64_t n, int64_t k, const uint8_t *packed, const float *absmax,
                 uint8_t *panels, float *scales, int nt);
/* panels -> dense [n,k] of `dtype` (F32 or BF16), one rounding of code*absmax */
int fader_panels_dense(int64_t n, int64_t k, const uint8_t *panels, const float *scales,
                       void *out, int dtype, int nt);
/* Plain panels of a matrix w [n,k] of F32 or BF16, the same columns side by side:
 *   bf16 [P][k/2][32] words of elements 2i (low half), 2i+1; fp32 [P][k][32]
 * Columns past n are zero. k % 64 == 0. */
int fader_pack(int64_t n, int64_t k, const void *w, int dtype, void *panels, int nt);
/* out [count,k] = rows `index` of the matrix that plain panels hold */
int fader_panel_rows(int64_t n, int64_t k, const void *panels, int dtype, const int64_t *index,
                     int64_t count, void *out);
/* flat blockwise NF4 of `count` elements, blocks of 64, bit-equal with bitsandbytes on CPU:
 * packed [(count+1)/2], absmax [ceil(count/64)] */
int fader_quantise(int64_t count, const void *w, int dtype, uint8_t *packed, float *absmax, int nt);
int fader_dequantise(int64_t count, const uint8_t *packed, const float *absmax, void *out, int dtype,
                     int nt);
/* The same for w [n,k] fp32, k % 64 == 0, but each code also makes up for the errors e of the codes before it
 * in its row: it minimises e_j^2 + weight * |sum_i e_i q_i|^2 over i <= j, q [k,r] fp32, q_i its row i */
int fader_quantise_keeping(int64_t n, int64_t k, const float *w, const float *q, int64_t r, float weight,
                           uint8_t *packed, float *absmax, int nt);
/* 8-bit blockwise (256) quantisation of absmax - offset against a sorted map [256] */
int fader_quantise8(int64_t count, const float *x, float offset, const float *map, uint8_t *codes,
                    float *absmax, int nt);
int fader_dequantise8(int64_t count, const uint8_t *codes, const float *absmax, const float *map,
                      float offset, float *out, int nt);

/* ---- One step's blends ------------------------------------------------------------------------
 * terms of request row r: term_ptr[r] .. term_ptr[r+1] of (term_slot, term_gamma), in the row's own
 * order; row_of_token [T]. Terms with gamma 0 are dropped. `blob` takes the plan (int32 words,
 * at least fader_plan_words(T, R, terms)). Opaque to the caller, reused by every site of the step. */
int64_t fader_plan_words(int64_t T, int64_t R, int64_t terms);
int fader_plan_build(int64_t T, int64_t R, const int32_t *term_ptr, const int32_t *term_slot,
                     const float *term_gamma, const int32_t *row_of_token, int32_t slots,
                     int32_t *blob, int64_t words);

/* ---- A site -----------------------------------------------------------------------------------
 * y[t, n0:n1] of member m  =  (x[t] . W[n0:n1]^T) * (1 + sum_i gamma_i * gain[s_i,m]) + bias
 *              + sum_i gamma_i * scale[s_i,m] * ((x[t] . A[s_i,m]^T) . B[s_i,m] + biasB[s_i,m])
 * accumulated in fp32 in the row's term order, rounded once.
 * Tables have one row per slot (`table_stride` elements apart), one column per member:
 *   a_off, b_off: element offset into the arena of A [rank,k] row-major and B [rank, n1-n0]
 *   rank-major, -1 = that adapter does not touch the member. Slots nobody names are never read.
 *   gain_off, bias_off: the same to vectors [n1-n0], -1 = none; NULL: no adapter has any. */
typedef struct { /* of a row, both kinds at a time */
    uint64_t key;         /* of `race` */
    int32_t keep;         /* how many of the largest, 1 to 128 */
    int32_t race;         /* 1: and the token that fader_draw gives without top_k; heat is 0.01 to 100 then */
    float heat;           /* 0: greedy; else what it is drawn at: of those that are kept, or of all */
    float reach;          /* race: tokens so far below the largest are not drawn (min_p); 1e31: all are */
    double top_p;         /* race: as of fader_draw. Below 1 the row may be left with that token alone */
    int64_t least;        /* of top_p: in units of 2^-44 what a token must weigh (min_p), 1 or more */
} fader_wanted_t;
typedef struct {
    const int8_t *codes;  /* [P][k/2][32][2] */
    const float *scales;  /* [P][k/64][32] */
    const fader_wanted_t *rows; /* [count] */
    int64_t count;        /* calls with as many rows leave out what theirs do not want; 0: no call does */
    int64_t computed;     /* written by those that look for a nucleus: how many panels they computed */
} fader_screen_t;
/* of plain panels: a weight is about scale * code, off by half a scale at most. FADER_E_BOUNDS where one is not finite */
int fader_screen_pack(int64_t n, int64_t k, const void *panels, int dtype, int8_t *codes, float *scales, int nt);

typedef struct {
    const uint8_t *panels; /* NULL: no base, out (fp32) is accumulated in place */
    const float *scales;   /* of NF4 panels */
    const float *bias; /* [n] fp32 or NULL; without panels: what out already holds */
    int64_t n, k;
    const void *arena;
    int64_t arena_count; /* elements */
    const int64_t *a_off, *b_off, *gain_off, *bias_off;
    const int32_t *rank;
    const float *scale;
    const int32_t *cols; /* [members][2]: n0, n1; ascending, disjoint */
    int64_t table_stride;
    int32_t members, slots, arena_dtype, weights; /* FADER_NF4 or FADER_PLAIN */
    fader_screen_t *screen; /* of plain panels, or NULL. While it is on, up to 8 rows, fp32 and without deltas here, have
                               what may be wanted exactly, and may have -inf for the rest, which is not */
} fader_site_t;

/* x [T,k] of x_dtype, with plain panels theirs too, rows x_stride elements apart; out [T,n] of out_dtype, rows out_stride apart.
 * plan NULL or without terms, or a site without members: base only. scratch: 64-byte aligned. */
int fader_site(const fader_site_t *site, const int32_t *plan, int64_t T, const void *x, int x_dtype,
               int64_t x_stride, void *out, int out_dtype, int64_t out_stride, void *scratch,
               int64_t scratch_bytes, int64_t *need, int nt);

/* The same for an embedding, k being its vocabulary: y[t] += y[t] * sum_i gamma_i * gain[s_i]
 *              + sum_i gamma_i * scale[s_i] * A[s_i][:, ids[t]] . B[s_i]
 * y [T,n] of y_dtype in place, rows y_stride apart, summed in fp32 and rounded once; one member. */
int fader_lookup(const fader_site_t *site, const int32_t *plan, int64_t T, const int64_t *ids, void *y, int y_dtype,
                 int64_t y_stride, void *scratch, int64_t scratch_bytes, int64_t *need, int nt);

/* ---- A stack of experts ---------------------------------------------------------------------------
 * out[p] = x[p] . W[e]^T + bias[e]; the rows of expert e are those from ends[e-1] (0 for the first) to ends[e].
 * panels: of the matrix [experts*n, k], n % 32 == 0: NF4 with its scales, or plain ones of x's dtype. */
typedef struct {
    const uint8_t *panels;
    const float *scales; /* of NF4 */
    const float *bias;   /* [experts, n] or NULL */
    int64_t n, k, experts;
    int32_t weights; /* FADER_NF4 or FADER_PLAIN */
} fader_experts_t;
/* x [T,k], out [T,n], rows x_stride and out_stride elements apart; ends [experts], the last one T */
int fader_experts(const fader_experts_t *stack, int64_t T, const int32_t *ends, const void *x, int dtype,
                  int64_t x_stride, void *out, int out_dtype, int64_t out_stride, void *scratch,
                  int64_t scratch_bytes, int64_t *need, int nt);

/* y[M,K] = w * round(x / rms), or (1 + w) * (x / rms) about one; rms = sqrt(mean(x^2) + eps) of a row of
 * x [M,K], rows x_stride elements apart; x, w, y of one dtype, to which round() rounds */
int fader_rms_norm(int64_t M, int64_t K, const void *x, int64_t x_stride, const void *w, int dtype,
                   int about_one, float eps, void *y, int nt);

/* y[M,K] = w * n(x) * act(gate), n(x) = x / sqrt(mean(x^2) + eps) over each `group` elements of a row, or with
 * `inside` w * n(x * act(gate)); act is SiLU, or the sigmoid; one rounding. y of x's dtype; w fp32 [K];
 * group % 16 == 0, K % group == 0 */
enum { FADER_GATE_INSIDE = 1, FADER_GATE_SIGMOID = 2 };
int fader_gated_norm(int64_t M, int64_t K, int64_t group, const void *x, int dtype, int64_t x_stride, const void *gate,
                     int gate_dtype, int64_t gate_stride, const float *w, int flags, float eps, void *y, int nt);

/* ---- Paged attention ---------------------------------------------------------------------------
 * caches [blocks, block_size, kv_heads, dim]; q, out [T, heads, dim]; one dtype for all of them.
 * Query i of a row with n queries stands at position context - n + i and sees positions <= its own,
 * with window > 0 only the last `window` of them. Positions past a query's own are never used,
 * positions past the row's context never read. Sums run over tiles of 32 absolute positions, so a
 * result depends neither on other rows nor on how a prompt was cut in chunks. A sink is one more score
 * of a query head, without a value and outside of softcap and window: it joins the sum alone, last. */
typedef struct {
    const void *k_cache, *v_cache;
    const float *sinks; /* [heads]; NULL: none */
    int64_t blocks, block_size, kv_heads, heads;
    int64_t dim, value_dim; /* of queries and keys, of values and outputs */
    int64_t max_blocks;     /* columns of block_tables */
    int64_t window;
    float scale, softcap; /* softcap 0: none */
    int32_t dtype, pad;
} fader_attn_t;

int fader_attention(const fader_attn_t *a, int64_t T, int64_t R, const void *q,
                    const int32_t *q_start, const int32_t *context, const int32_t *block_tables,
                    void *out, void *scratch, int64_t scratch_bytes, int64_t *need, int nt);
/* k, v [T, kv_heads, dim] (rows k_stride, v_stride elements apart) into the token slots
 * block*block_size + offset of `slots` [T]; -1 skips the token */
int fader_write_kv(const fader_attn_t *a, int64_t T, const void *k, int64_t k_stride, const void *v,
                   int64_t v_stride, const int64_t *slots, int nt);

/* ---- States of sequences -------------------------------------------------------------------------
 * A row of tokens goes on from the state in slot from[r] (-1: zeros) and leaves its own in slot to[r], another
 * one, so a row that went on from a state may do so again. Token by token: results do not depend on how a
 * sequence was cut in rows, nor on other rows. */
typedef struct {
    const int32_t *start, *from, *to; /* [R+1] rows' first tokens, ending at T; [R]; [R] */
} fader_rows_t;

/* out[t,c] = bias[c] + sum_j weight[j,c] * x[t - taps + 1 + j, c], rounded to dtype, then silu of that if asked
 * for; tokens before a row's first come from its state. x [T, channels], rows x_stride apart; out [T, channels] */
typedef struct {
    void *states;        /* [slots][taps-1][channels] of dtype, oldest first */
    const float *weight; /* [taps][channels] */
    const float *bias;   /* [channels] or NULL */
    int64_t slots, channels, taps; /* channels % 16 == 0 */
    int32_t dtype, silu;
} fader_conv_t;
int fader_conv(const fader_conv_t *conv, int64_t T, int64_t R, const fader_rows_t *rows, const void *x, int64_t x_stride,
               void *out, int nt);

/* For each head, with S its state [keys, values], d = exp(g), g and b its gates:
 *   u = b * (v - (d S)^T k) if delta, else b * v;   S = d S + k u^T;   out[t, head] = S^T q + skip[head] * v
 * g is one number, or with by_key one for each of the keys.
 * q, k are those of the head's group; with `unit` they are x / sqrt(|x|^2 + 1e-6), q also / sqrt(keys).
 * q, k [groups, keys], v [heads, values] begin at these elements of a row of x; out [T, heads, values] */
typedef struct {
    float *states;     /* [slots][heads][keys * values], in the kernel's own order */
    const float *skip; /* [heads] or NULL */
    int64_t slots, groups, heads, keys, values; /* keys, values % 16 == 0, keys <= 256 */
    int64_t q, k, v;
    int32_t delta, unit, by_key, pad;
} fader_scan_t;
/* x [T, x_stride] of dtype, gates fp32: of a token g of every head, then b of every head; out of out_dtype: that of x, or fp32 */
int fader_scan(const fader_scan_t *scan, int64_t T, int64_t R, const fader_rows_t *rows, const void *x, int dtype,
               int64_t x_stride, const float *gates, void *out, int out_dtype, int nt);

/* For each channel, with h its state [keys], step = softplus(dt + bias) if softplus, else dt + bias, each rounded to dtype:
 *   h = exp(step decay) h + step x B;   out[t, channel] = (h^T C + skip x) silu(gate)
 * A row of `steps` is dt [channels], B [keys], C [keys]. Whoever gives no gate leaves silu(gate) out */
typedef struct {
    float *states;       /* [slots][channels/16][keys][16] */
    const float *decay;  /* [channels/16][keys][16] */
    const float *bias;   /* [channels] or NULL */
    const float *skip;   /* [channels] or NULL */
    int64_t slots, channels, keys; /* channels % 16 == 0, keys <= 256 */
    int32_t softplus, pad;
} fader_selective_t;
/* x [T, x_stride], steps [T, channels + 2 keys], gate [T, gate_stride] or NULL, out [T, channels], all of dtype */
int fader_selective(const fader_selective_t *scan, int64_t T, int64_t R, const fader_rows_t *rows, const void *x, int dtype,
                    int64_t x_stride, const void *steps, const void *gate, int64_t gate_stride, void *out, int nt);

/* ---- Elementwise ---------------------------------------------------------------------------------
 * out = map(x, y) over `size`, steps in elements; y NULL: `scalar` stands for it. dtype is that of x and y;
 * only a copy may change it. GELU is x Phi(x), by erf; GELU_TANH its approximation. An element's bits depend
 * on nothing but itself: a tail goes through the same code. */
enum { FADER_OP_SITE, FADER_OP_NORM, FADER_OP_WRITE_KV, FADER_OP_ATTEND, FADER_OP_GATHER, FADER_OP_MAP, FADER_OP_LOOKUP, FADER_OP_EXPERTS,
       FADER_OP_CONV, FADER_OP_SCAN, FADER_OP_GATED_NORM, FADER_OP_SELECTIVE };
enum { FADER_MAP_COPY, FADER_MAP_NEG, FADER_MAP_ADD, FADER_MAP_SUB, FADER_MAP_MUL, FADER_MAP_SILU, FADER_MAP_GELU_TANH,
       FADER_MAP_SIGMOID, FADER_MAP_SOFTPLUS, FADER_MAP_EXP, FADER_MAP_LOG, FADER_MAP_GELU, FADER_MAP_TANH };
typedef struct {
    int32_t kind, map, dtype, out_dtype; /* map: NORM: about_one; GATED_NORM: flags; GATHER: rows are panels;
                                            SITE: base only. out_dtype: GATED_NORM: of y, the gate */
    const void *what;                    /* the struct of the kind, or the weight of NORM, GATED_NORM */
    const void *x, *y; /* WRITE_KV: k, v; GATHER: rows [n,k], int64 index [size[0]]; LOOKUP: int64 ids, -;
                          EXPERTS: -, int32 ends; SCAN: -, gates; SELECTIVE: -, steps */
    const void *z;     /* SELECTIVE: gate, rows y_stride apart */
    void *out;
    const float *bias;
    int64_t n, k, x_stride, y_stride, out_stride;
    int64_t size[4], x_step[4], y_step[4], out_step[4]; /* MAP; innermost x and out steps 1, y 0 or 1;
                                                           SITE, LOOKUP, NORM, EXPERTS, CONV, SCAN, GATED_NORM, SELECTIVE: size[0] rows */
    float scalar;                                       /* NORM, GATED_NORM: eps */
    int32_t pad;
} fader_op_t;
int fader_map(const fader_op_t *op);

/* ---- A recorded step -----------------------------------------------------------------------------
 * Runs ops[*next ..count) in order. On a status other than 0, *next is the call that gave it and nothing
 * after it has run: after FADER_E_SCRATCH, call again with *need bytes. */
typedef struct {
    int64_t tokens, rows;
    const int32_t *plan; /* NULL: base only */
    const int32_t *q_start, *context, *block_tables;
    int64_t max_blocks;
    const int64_t *slots; /* [tokens] */
    const int32_t *state_from, *state_to; /* [rows]; NULL: no states */
} fader_step_t;
int fader_run(const fader_op_t *ops, int64_t count, int64_t *next, const fader_step_t *step, void *scratch,
              int64_t scratch_bytes, int64_t *need, int nt);

/* ---- Rows of logits -------------------------------------------------------------------------------
 * Rows `index` [R] (NULL: the first R) of x [rows, n], of F32 or BF16, `stride` elements apart; n < 2^19. A token weighs
 * floor(2^44 exp((x - max x) / heat)), a 64-bit integer. Equal logits: the lowest number comes first. */
typedef struct {
    const void *x;
    const int64_t *index;
    int64_t rows, n, stride;
    int32_t dtype, pad;
} fader_logits_t;

/* best[R], tokens[R]: the largest and its token; NaN where a row holds one */
int fader_largest(const fader_logits_t *logits, int64_t R, float *best, int64_t *tokens, void *scratch, int64_t scratch_bytes,
                  int64_t *need, int nt);

/* tokens[R]: that of the largest (x - max x) / heat - log(-log u), u = (h + 1/2) / 2^52, h the upper 52 bits of output number
 * `token` of a SplitMix64 generator that starts at the row's key; of those that top_k (0: all), then top_p, then min_p leave; all
 * tied at an edge stay. 0 in a row whose largest is not finite */
typedef struct {
    const float *heat; /* > 0 */
    const int64_t *top_k;
    const double *top_p, *min_p; /* in [0, 1] */
    const uint64_t *key;
    int64_t *tokens;
} fader_draw_t;
int fader_draw(const fader_logits_t *logits, const fader_draw_t *draw, int64_t R, void *scratch, int64_t scratch_bytes,
               int64_t *need, int nt);

/* out [R, 1 + 2 top]: logprob of tokens[R], the numbers of the `top` <= n likeliest, their logprobs; NaN for each in rows whose
 * largest is not finite */
typedef struct {
    const int64_t *tokens;
    double *out;
    int64_t top;
} fader_scores_t;
int fader_score(const fader_logits_t *logits, const fader_scores_t *scores, int64_t R, void *scratch, int64_t scratch_bytes,
                int64_t *need, int nt);

/* ask for huge pages inside [p, p + bytes), before it is first written; a hint, never an error */
void fader_advise_huge(void *p, int64_t bytes);

/* measured limits for benchmarks: bytes summed once; multiply-adds of `rounds` register loops */
double fader_probe_read(const void *data, int64_t bytes, int nt);
double fader_probe_dot(int64_t rounds, int nt);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
#endif

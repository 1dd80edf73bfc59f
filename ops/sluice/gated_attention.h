/* gated_attention: attention in which a separable, learned gate picks the pairs that are worth computing.
 *
 * FORMULA (mode "select"; the seed formula softmax(QK^T / sqrt d) * sigma(W_g [q; k]) V, whose gate is linear in the
 * concatenation [q; k] and therefore splits into one number per query and one per key):
 *
 *   p_i  = i + q_offset                                   the place of query i among the keys
 *   r_ij = scale * <q_i, k_j>
 *   s_ij = cap(r_ij) - slope |p_i - j| + m_ij             cap(r) = softcap tanh(r / softcap), or r where softcap is 0
 *   z_ij = clamp(a_i, -40, 40) + clamp(b_j, -40, 40)      in float32 (NaN stays NaN)
 *   near_ij = |p_i - j| < window  or  j < text_begin + sinks  such pairs are kept whatever the gate says, with g_ij = 1
 *   g_ij = near_ij ? 1 : sigmoid(z_ij)
 *   K_i  = { j valid : near_ij  or  not (z_ij < logit_tau)  or  (causal and j = p_i) }
 *          where valid means key_begin <= j < key_end (key_range; 0 and n_k without), m_ij > -inf, if causal j <= p_i,
 *          and with a sliding window |p_i - j| < sliding_window
 *   out_i = sigmoid(o_i) * sum over j in K_i of softmax over K_i (s_i)_j * d_ij * g_ij * v_j
 *   lse_i = log sum over j in K_i of exp(s_ij)            (of the softmax alone: the gate is not in it)
 *   kept_i = |K_i|                                        the pairs that are computed
 *
 * PLACES  Positions are places in the text, one offset per batch entry; without them the keys end with the last query:
 *   q_offset    the key at whose place query 0 sits; without, n_k - n_q. Under causal, keys behind the last query are
 *               seen by nobody, so a cache may be longer than the text. 0 <= q_offset <= n_k - n_q.
 *   text_begin  the key that is the first of the text, from which sinks count; without, key_begin, so that padding on
 *               the left changes nothing. Below it where the first keys of the text are gone (a cache that slides).
 *               -2^31 <= text_begin <= key_begin.
 *
 * PAGES  Where block_table is given, k, v and b are a cache of blocks that sequences take in any order, [blocks, Hkv,
 *     block_size, D], [.., Dv] and [.., ] by their strides (batch_stride is that from block to block). Key j of batch
 *     entry i is row j % block_size of block block_table[i][j / block_size]. A block of -1 is a hole: its keys are not
 *     valid, as if masked; they were dropped, and later keys keep their places. Columns that no valid key (key_range)
 *     needs are not looked at. q_offset may be as low as -n_q: queries before the text see nothing under causal.
 *     Strides of k and v: from block to block a multiple of that from token to token, the same one in both.
 *     Forward on the CPU only; the backward and CUDA give SL_UNSUPPORTED.
 *
 * SCORES  What happens to a score between the product and the softmax, each left out by default:
 *   softcap        r is bent so that it stays within (-softcap, softcap), as in Gemma 2.
 *   alibi_slopes   slope of a head: a score falls with the distance of its pair (ALiBi, arXiv 2108.12409).
 *   attn_mask      m_ij: numbers that are added, or booleans, of which false is -inf and true 0. Broadcast over any of
 *                  its dimensions. A pair with -inf is not valid, whatever its score.
 *   sliding_window cuts: what is farther away is seen by nobody, sinks included. window, in contrast, only says which
 *                  pairs the gate has no say in.
 *
 * BEHIND THE SOFTMAX, each left out by default (then sigmoid(o_i) and d_ij are 1):
 *   output_gate    o_i, logits of a gate on the output, one per query and head, or one for each channel (arXiv
 *                  2505.06708; Qwen's head-wise and element-wise gates).
 *   dropout        d_ij is 0 with probability dropout_p, else 1 / (1 - dropout_p). Which it is depends on dropout_seed,
 *                  batch entry, query head, query and key alone: not on threads, tiles or tiers. lse is not touched.
 *
 * With logit_tau = -inf (tau = 0), window = 0 and sinks = 0 this is the seed's formula to the letter.
 * A row with an empty K_i gives out_i = 0 and lse_i = -inf, and zero gradients.
 *
 * GRADIENT, with P = softmax, D_i = <dout_i, out_i> - dlse_i, y_i = dout_i sigmoid(o_i), e_ij = d_ij <y_i, v_j>:
 *   do_i = dout_i out_i (1 - sigmoid(o_i)), summed over the channels of one logit
 *   dv_j = sum_i P_ij g_ij d_ij y_i               ds_ij = P_ij (g_ij e_ij - D_i)
 *   dr_ij = ds_ij (1 - tanh^2(r_ij / softcap)), or ds_ij where softcap is 0
 *   dq_i = scale sum_j dr_ij k_j                  dk_j  = scale sum_i dr_ij q_i
 *   dm = ds, summed over what m is broadcast over; alibi_slopes have no gradient
 *   dz_ij = P_ij e_ij g_ij (1 - g_ij)  for pairs that are not near, else 0
 *   da_i = sum_j dz_ij where |a_i| <= 40, else 0  db_j = sum_i dz_ij where |b_j| <= 40, else 0
 * Dropped pairs have no gradient. With grouped query heads dk, dv and db sum over the group.
 *
 * OPERATORS
 *   sluice::gated_attention(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? logit_tau, Tensor? key_range,
 *                           Tensor? q_offset, Tensor? text_begin, Tensor? attn_mask, Tensor? alibi_slopes,
 *                           Tensor? output_gate, Tensor? dropout_seed, bool causal, int window, int sinks,
 *                           int sliding_window, float softcap, float dropout_p, float scale)
 *                           -> (Tensor out, Tensor lse, Tensor kept)
 *   sluice::gated_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b,
 *                           Tensor? logit_tau, Tensor? key_range, Tensor? q_offset, Tensor? text_begin,
 *                           Tensor? attn_mask, Tensor? alibi_slopes, Tensor? output_gate, Tensor? dropout_seed,
 *                           Tensor out, Tensor lse, bool causal, int window, int sinks, int sliding_window,
 *                           float softcap, float dropout_p, float scale, bool mask_gradient)
 *                           -> (Tensor dq, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor dattn_mask,
 *                               Tensor doutput_gate)
 *   sluice::gated_attention_paged(Tensor q, Tensor k_cache, Tensor v_cache, Tensor a, Tensor b_cache,
 *                           Tensor block_table, Tensor seqlens_k, Tensor? logit_tau, Tensor? q_offset,
 *                           Tensor? attn_mask, Tensor? alibi_slopes, bool causal, int window, int sinks,
 *                           int sliding_window, float softcap, float scale)
 *                           -> (Tensor out, Tensor lse, Tensor kept)
 *       key_range is [0, seqlens_k), q_offset without a value seqlens_k - n_q. Attention alone has no gradient here:
 *       tensors that require one are refused.
 *
 * SHAPES  q [B, Hq, Nq, D]  k [B, Hkv, Nk, D]  v [B, Hkv, Nk, Dv]  a [B, Hq, Nq]  b [B, Hkv, Nk]
 *         logit_tau [B, Hq] (absent: tau = 0)   key_range [B, 2] int64, begin and end (absent: all keys)
 *         q_offset, text_begin [B] int64 (absent: see PLACES)   alibi_slopes [B, Hq] (absent: 0)
 *         attn_mask [B or 1, Hq or 1, Nq or 1, Nk or 1] (absent: 0)   dattn_mask like attn_mask, or empty where
 *         mask_gradient is false
 *         output_gate [B, Hq, Nq, 1 or Dv] (absent: 1)   doutput_gate like output_gate, or empty
 *         dropout_seed [1] int64 (absent: no dropout)
 *         out [B, Hq, Nq, Dv]  lse, dlse [B, Hq, Nq] (dlse absent: 0)  kept [B, Hq, Nq] int32.
 *         Hq is a multiple of Hkv; query head h reads key head h / (Hq / Hkv).
 *         1 <= D, Dv <= 256. B, Nq may be 0 (empty results); Nk may be 0 (all rows empty).
 *         gated_attention_paged: k_cache [blocks, block_size, Hkv, D]  v_cache [.., Dv]  b_cache [.., Hkv]
 *         block_table [B, max_blocks] int32   seqlens_k [B] int32 or int64   Nk of attn_mask: max_blocks * block_size
 * DTYPES  q, k, v, output_gate, out, dout, dq, dk, dv, doutput_gate: one of float32, bfloat16, float16, float64.
 *         a, b, logit_tau, alibi_slopes, lse, dlse, da, db, dattn_mask: float32, with float64 inputs float64.
 *         attn_mask: bool, float32, bfloat16, float16 or float64, rounded to the former. Half-precision inputs are
 *         multiplied exactly and summed in float32. window, sinks, sliding_window: tokens; 0 is none.
 *         softcap: finite, >= 0, in units of a score; 0 is none. dropout_p: in [0, 1).
 * STRIDES any; only the last dimension of q, k, v, output_gate, out and dout and their gradients must be contiguous.
 * ERRORS  SL_INVALID_ARGUMENT, SL_OUT_OF_RANGE, SL_OUT_OF_MEMORY (workspace_size too small), SL_UNSUPPORTED (dtype).
 * DETERMINISM  the same inputs give the same bits, whatever the number of threads.
 */
#ifndef SLUICE_GATED_ATTENTION_H
#define SLUICE_GATED_ATTENTION_H

#include <stdbool.h>

#include <sluice/executor.h>
#include <sluice/types.h>

#define SL_GATED_ATTENTION_SCHEMA                                                                         \
  "gated_attention(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? logit_tau, "                 \
  "Tensor? key_range, Tensor? q_offset, Tensor? text_begin, Tensor? attn_mask, "                          \
  "Tensor? alibi_slopes, Tensor? output_gate, Tensor? dropout_seed, bool causal, int window, int sinks, " \
  "int sliding_window, float softcap, float dropout_p, float scale) "                                     \
  "-> (Tensor out, Tensor lse, Tensor kept)"
#define SL_GATED_ATTENTION_BACKWARD_SCHEMA                                                                       \
  "gated_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, "       \
  "Tensor? logit_tau, Tensor? key_range, Tensor? q_offset, Tensor? text_begin, Tensor? attn_mask, "              \
  "Tensor? alibi_slopes, Tensor? output_gate, Tensor? dropout_seed, Tensor out, Tensor lse, bool causal, "       \
  "int window, int sinks, int sliding_window, float softcap, float dropout_p, float scale, bool mask_gradient) " \
  "-> (Tensor dq, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor dattn_mask, Tensor doutput_gate)"

#define SL_GATED_ATTENTION_PAGED_SCHEMA                                                                            \
  "gated_attention_paged(Tensor q, Tensor k_cache, Tensor v_cache, Tensor a, Tensor b_cache, Tensor block_table, " \
  "Tensor seqlens_k, Tensor? logit_tau, Tensor? q_offset, Tensor? attn_mask, Tensor? alibi_slopes, bool causal, "  \
  "int window, int sinks, int sliding_window, float softcap, float scale) "                                        \
  "-> (Tensor out, Tensor lse, Tensor kept)"

/* |a| and |b| are clamped to this, so that exp(-a) * exp(-b) stays finite in float32. */
#define SL_GATE_LOGIT_LIMIT 40.0f
#define SL_ATTENTION_MAX_HEAD_DIM 256

#ifdef __cplusplus
extern "C" {
#endif

/* A [batch, head, token, channel] tensor; strides in elements, channel stride is 1. */
typedef struct sl_tensor4 {
  void *data;
  int64_t batch_stride, head_stride, token_stride;
} sl_tensor4;

/* A [batch, head, token] tensor of gate logits, lse or their gradients; strides in elements. */
typedef struct sl_tensor3 {
  void *data;
  int64_t batch_stride, head_stride, token_stride;
} sl_tensor3;

/* A [batch, head, query, key] tensor; strides in elements, 0 where it is broadcast. data NULL: absent. */
typedef struct sl_attention_mask {
  void *data;
  sl_dtype dtype;
  int64_t batch_stride, head_stride, query_stride, key_stride;
} sl_attention_mask;

typedef struct sl_gated_attention_args {
  sl_dtype dtype;
  int64_t batch, heads_q, heads_kv, n_q, n_k, head_dim, head_dim_v;
  sl_tensor4 q, k, v;
  sl_tensor3 a, b;
  const void *logit_tau;                /* [batch, heads_q], contiguous; NULL: tau = 0 */
  const int64_t *key_range;             /* [batch, 2], contiguous, begin and end of the valid keys; NULL: all */
  const int64_t *q_offset, *text_begin; /* [batch], contiguous; NULL: see PLACES */
  sl_attention_mask attn_mask;
  const void *alibi_slopes; /* [batch, heads_q], contiguous; NULL: none */
  bool causal;
  int64_t window, sinks, sliding_window; /* >= 0 */
  double softcap;                        /* finite, >= 0 */
  double scale;                          /* finite */
  sl_tensor4 output_gate;                /* data NULL: none */
  int64_t output_gate_channels;          /* 1 or head_dim_v */
  double dropout_p;                      /* in [0, 1) */
  const int64_t *dropout_seed;           /* one number; not read where dropout_p is 0 */
  int64_t dropout_first_row;             /* the number of the first (batch, head, query) row: 0, or its place in a call
                                            of which this one is a part */
  const int32_t *block_table;            /* [batch, max_blocks], contiguous; NULL: k, v, b are dense. See PAGES */
  int64_t max_blocks, block_size, blocks;
  sl_tensor4 out; /* written by the forward, read by the backward */
  sl_tensor3 lse; /* written by the forward (data may be NULL there), read by the backward */
  void *kept;     /* int32 [batch, heads_q, n_q], contiguous, written by the forward; NULL: not wanted */

  /* Backward only. */
  sl_tensor4 dout;              /* read */
  sl_tensor3 dlse;              /* read; data NULL: 0 */
  sl_tensor4 dq, dk, dv;        /* written */
  sl_tensor3 da, db;            /* written */
  sl_tensor4 doutput_gate;      /* written, where there is an output_gate */
  sl_attention_mask dattn_mask; /* written, in the dtype of a; where a stride is 0, summed over that dimension */

  void *workspace; /* 64-byte aligned; its content on entry does not matter */
  size_t workspace_size;
  const sl_executor *executor; /* NULL: serial */
} sl_gated_attention_args;

/* Bytes of workspace that the call with these args needs. Data is not read: only whether there is a mask or a
 * block_table. */
SL_API sl_status sl_gated_attention_workspace_size(const sl_gated_attention_args *args, size_t *bytes);
SL_API sl_status sl_gated_attention_backward_workspace_size(const sl_gated_attention_args *args, size_t *bytes);

/* Makes args those of a paged cache, from the lengths of its sequences: sets block_table, n_k, key_range and q_offset.
 * Before, args hold the other sizes, q_offset as given or NULL (seqlens_k - n_q), and max_blocks, block_size and
 * blocks. seqlens_k [batch] is int32 or int64, each 0 to max_blocks * block_size; q_offset is at most that, too.
 * places [3 * batch] is memory in which key_range and q_offset then lie. */
SL_API sl_status sl_gated_attention_place_pages(sl_gated_attention_args *args, const void *block_table,
                                                const void *seqlens_k, sl_dtype seqlens_dtype, int64_t *places);

SL_API sl_status sl_gated_attention(const sl_gated_attention_args *args);
SL_API sl_status sl_gated_attention_backward(const sl_gated_attention_args *args);

/* The formula above in plain scalar C: the specification that every kernel is tested against.
 * Needs no workspace; runs on the calling thread. */
SL_API sl_status sl_gated_attention_reference(const sl_gated_attention_args *args);
SL_API sl_status sl_gated_attention_backward_reference(const sl_gated_attention_args *args);

/* Name of the kernel that dispatch picks for this dtype on this machine, e.g. "avx2_f32_6x16". Never NULL. */
SL_API const char *sl_gated_attention_kernel_name(sl_dtype dtype);

/* Where the time of forwards of many queries went between the two calls below, on the CPU: seconds, summed over the
 * workers. For benchmarks: of the whole process, whose calls must come one after the other. */
typedef struct sl_attention_profile {
  double busy;                      /* all of it */
  double sort;                      /* putting keys in order */
  double pack;                      /* packing keys and values */
  double rows;                      /* loading queries, putting them in order, storing results */
  double scores;                    /* products of queries and keys */
  double softmax;                   /* with the gate, and what cuts by position */
  double values;                    /* products of weights and values */
  int64_t score_pairs, value_pairs; /* that these products went over; kept says how many were needed */
} sl_attention_profile;

SL_API void sl_attention_profile_begin(void);                        /* sets all to 0, and times from now on */
SL_API void sl_attention_profile_end(sl_attention_profile *profile); /* stops, and says what there was */

#ifdef __cplusplus
}
#endif
#endif

/* quantize_recurrent: LSTM and GRU layers on integers, one layer in one direction over whole sequences. The weights are
 * packed as those of linear layers, each matrix on its own: see quantize.h, whose rules of rounding, widths, products
 * and outlier channels hold here too.
 *
 * FORMULA, of step t, in torch's order of gates. With the products
 *   a = linear_dynamic(x_t, W_ih, b_ih)      [gates * hidden_size], for all steps at once, per_token
 *   b = linear_dynamic(h, W_hh, b_hh)        h is the state of the step before, or h0; a scale and width for each row
 *   LSTM, gates i, f, g, o:
 *     i, f, o = sigmoid(a + b), g = tanh(a + b)
 *     c = f * c + i * g;  h = o * tanh(c)
 *     with a projection, W_hr [proj_size, hidden_size]: h = linear_dynamic(o * tanh(c), W_hr)
 *   GRU, gates r, z, n, with the reset after the product:
 *     r, z = sigmoid(a + b), n = tanh(a + r * b)
 *     h = (1 - z) * n + z * h
 *   out_t = h. All but the products is float32, whatever the dtype of x, and sigmoid and tanh are approximations, with
 *   a relative error of some 1e-7.
 *   Outlier channels are left out of x only: activation_bits is the width of x, state_bits that of what W_hh and W_hr
 *   are multiplied by, both with target_sqnr.
 *
 * SEQUENCES, as torch.nn.utils.rnn.PackedSequence has them: row j of step t belongs to sequence j, and sequence j has a
 *   row in the steps t with batch_sizes[t] > j, which come first: batch_sizes does not grow. The rows of all steps
 *   follow one another, rows = the sum of batch_sizes. Without batch_sizes each step has a row of every sequence.
 *   reverse: each sequence is run from its last row to its first; out stays where x is.
 *   hn and cn [batch, ...] are the states after the last step of each sequence that is run. One without any row has h0
 *   and c0.
 *
 * OPERATORS (Python's functions of the same names in torch_sluice.quantize have the defaults)
 *   sluice::lstm_dynamic(Tensor x, Tensor h0, Tensor c0, Tensor packed_ih, Tensor scale_ih, Tensor packed_hh,
 *       Tensor scale_hh, Tensor? packed_hr, Tensor? scale_hr, Tensor? bias_ih, Tensor? bias_hh, Tensor? batch_sizes,
 *       int[] weight_bits, int[] group_size, bool reverse, int activation_bits, int state_bits, float target_sqnr,
 *       float outlier_ratio) -> (Tensor out, Tensor hn, Tensor cn, Tensor bits)
 *   sluice::gru_dynamic(Tensor x, Tensor h0, Tensor packed_ih, Tensor scale_ih, Tensor packed_hh, Tensor scale_hh,
 *       Tensor? bias_ih, Tensor? bias_hh, Tensor? batch_sizes, int[] weight_bits, int[] group_size, bool reverse,
 *       int activation_bits, int state_bits, float target_sqnr, float outlier_ratio)
 *       -> (Tensor out, Tensor hn, Tensor bits)
 *     x [steps, batch, inputs] or, with batch_sizes int64 [steps], [rows, inputs]; out likewise, with hidden_size or
 *     proj_size columns. h0, hn [batch, hidden_size or proj_size], c0, cn [batch, hidden_size]. weight_bits and
 *     group_size have an entry for each matrix, in the order ih, hh, hr. bits int8 [matrices, rows]: the width that
 *     each row of x, of h and of o * tanh(c) took, 0 for one that is not finite.
 *
 * DTYPES  x: float32, bfloat16 or float16; h0, c0, out, hn and cn have it. Biases: any of these. State is kept in
 *         float32 from step to step.
 * STRIDES any: what is not contiguous goes through a copy.
 * NOT FINITE  an infinity or NaN in a row makes NaN of what follows in its sequence, and changes no other sequence.
 * DEVICES CPU. INFERENCE only, as in quantize.h.
 * ERRORS  SL_INVALID_ARGUMENT, SL_OUT_OF_RANGE, SL_OUT_OF_MEMORY (workspace_size too small), SL_UNSUPPORTED (dtype).
 * DETERMINISM  the same inputs give the same bits, whatever the number of threads. Between CPU tiers the last bits of h
 *         differ, and with them, now and then, an integer that it is rounded to.
 */
#ifndef SLUICE_QUANTIZE_RECURRENT_H
#define SLUICE_QUANTIZE_RECURRENT_H

#include <sluice/quantize.h>

#define SL_LSTM_DYNAMIC_SCHEMA                                                                                    \
  "lstm_dynamic(Tensor x, Tensor h0, Tensor c0, Tensor packed_ih, Tensor scale_ih, Tensor packed_hh, "            \
  "Tensor scale_hh, Tensor? packed_hr, Tensor? scale_hr, Tensor? bias_ih, Tensor? bias_hh, Tensor? batch_sizes, " \
  "int[] weight_bits, int[] group_size, bool reverse, int activation_bits, int state_bits, float target_sqnr, "   \
  "float outlier_ratio) -> (Tensor out, Tensor hn, Tensor cn, Tensor bits)"
#define SL_GRU_DYNAMIC_SCHEMA                                                                                  \
  "gru_dynamic(Tensor x, Tensor h0, Tensor packed_ih, Tensor scale_ih, Tensor packed_hh, Tensor scale_hh, "    \
  "Tensor? bias_ih, Tensor? bias_hh, Tensor? batch_sizes, int[] weight_bits, int[] group_size, bool reverse, " \
  "int activation_bits, int state_bits, float target_sqnr, float outlier_ratio) -> (Tensor out, Tensor hn, "   \
  "Tensor bits)"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sl_recurrent_dynamic_args {
  int64_t steps, batch;
  int64_t rows;               /* of x: steps * batch, or the sum of batch_sizes */
  const int64_t *batch_sizes; /* [steps]; NULL: batch */
  int64_t hidden_size;
  sl_quantized_weight input;      /* W_ih: out_features = gates * hidden_size */
  sl_quantized_weight hidden;     /* W_hh: in_features = hidden_size or, with a projection, its out_features */
  bool project;                   /* LSTM only */
  sl_quantized_weight projection; /* W_hr; read with project */
  sl_dtype dtype;                 /* of x, h0, c0, out, hn and cn: SL_F32, SL_BF16 or SL_F16 */
  const void *x;                  /* [rows, input.in_features] */
  const void *h0;                 /* [batch, hidden.in_features] */
  const void *c0;                 /* [batch, hidden_size]; LSTM only */
  const float *input_bias;        /* [gates * hidden_size]; NULL: none */
  const float *hidden_bias;       /* [gates * hidden_size]; NULL: none */
  bool reverse;
  int32_t activation_bits, state_bits;
  double target_sqnr;   /* dB; read for SL_BITS_BY_SQNR */
  double outlier_ratio; /* 0: no outlier channels */
  void *out;            /* written, [rows, hidden.in_features] */
  void *hn;             /* written, [batch, hidden.in_features] */
  void *cn;             /* written, [batch, hidden_size]; LSTM only */
  int8_t *bits;         /* written, [2 or, with project, 3, rows] */
  void *workspace;      /* 64-byte aligned; its content on entry does not matter */
  size_t workspace_size;
  const sl_executor *executor; /* NULL: serial */
} sl_recurrent_dynamic_args;

/* lstm_dynamic, and the bytes of workspace that it needs with this executor; 4 gates. */
SL_API sl_status sl_lstm_dynamic_workspace_size(const sl_recurrent_dynamic_args *args, size_t *bytes);
SL_API sl_status sl_lstm_dynamic(const sl_recurrent_dynamic_args *args);

/* gru_dynamic, and the bytes of workspace that it needs with this executor; 3 gates. */
SL_API sl_status sl_gru_dynamic_workspace_size(const sl_recurrent_dynamic_args *args, size_t *bytes);
SL_API sl_status sl_gru_dynamic(const sl_recurrent_dynamic_args *args);

#ifdef __cplusplus
}
#endif
#endif

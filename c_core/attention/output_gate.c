/* The gate on the output, forward and backward. Each row is one pass over its channels. */
#include "attention/output_gate.h"

#include <math.h>

#include "attention/element.h"
#include "runtime/executor.h"

enum { MOST = SL_ATTENTION_MAX_HEAD_DIM };

/* What the channels of a row are multiplied by. */
static void load_gates(const sl_gated_attention_args *args, int64_t first, float *gates) {
  int64_t count = args->output_gate_channels;
  for (int64_t c = 0; c < count; ++c) {
    gates[c] = (float)sl_element_load(args->dtype, args->output_gate.data, first + c);
  }
  for (int64_t c = 0; c < count; ++c) gates[c] = 1 / (1 + expf(-gates[c]));
  for (int64_t c = count; c < args->head_dim_v; ++c) gates[c] = gates[0];
}

static int64_t row_offset(const sl_tensor4 *tensor, int64_t batch, int64_t head, int64_t query) {
  return batch * tensor->batch_stride + head * tensor->head_stride + query * tensor->token_stride;
}

void sl_output_gate_apply(const sl_gated_attention_args *args, int64_t batch, int64_t head, int64_t query, float *row) {
  if (!args->output_gate.data) return;
  float gates[MOST] = {0};
  load_gates(args, row_offset(&args->output_gate, batch, head, query), gates);
  for (int64_t c = 0; c < args->head_dim_v; ++c) row[c] *= gates[c];
}

static sl_tensor4 dense(const sl_gated_attention_args *args, void *data) {
  int64_t rows = args->n_q * args->head_dim_v;
  return (sl_tensor4){data, args->heads_q * rows, rows, args->head_dim_v};
}

size_t sl_output_gate_bytes(const sl_gated_attention_args *args) {
  if (!args->output_gate.data) return 0;
  return (size_t)(args->batch * args->heads_q * args->n_q * args->head_dim_v) * sl_dtype_size(args->dtype);
}

typedef struct gate_pass {
  const sl_gated_attention_args *args;
  sl_tensor4 gradient; /* of the output before the gate */
} gate_pass;

static void differentiate_row(void *context, int64_t worker, int64_t task) {
  (void)worker;
  const gate_pass *pass = context;
  const sl_gated_attention_args *args = pass->args;
  int64_t query = task % args->n_q, head = task / args->n_q % args->heads_q, batch = task / args->n_q / args->heads_q;
  int64_t out = row_offset(&args->out, batch, head, query), dout = row_offset(&args->dout, batch, head, query);
  int64_t to = row_offset(&pass->gradient, batch, head, query);
  int64_t gradient = row_offset(&args->doutput_gate, batch, head, query);
  bool one = args->output_gate_channels == 1;
  float gates[MOST] = {0};
  double sum = 0;
  load_gates(args, row_offset(&args->output_gate, batch, head, query), gates);
  for (int64_t c = 0; c < args->head_dim_v; ++c) {
    double gate = gates[c];
    double received = sl_element_load(args->dtype, args->dout.data, dout + c);
    double of_logit = received * sl_element_load(args->dtype, args->out.data, out + c) * (1 - gate);
    sl_element_store(args->dtype, pass->gradient.data, to + c, received * gate);
    sum += of_logit;
    if (!one) sl_element_store(args->dtype, args->doutput_gate.data, gradient + c, of_logit);
  }
  if (one) sl_element_store(args->dtype, args->doutput_gate.data, gradient, sum);
}

sl_tensor4 sl_output_gate_differentiate(const sl_gated_attention_args *args, void *workspace) {
  if (!args->output_gate.data) return args->dout;
  gate_pass pass = {args, dense(args, workspace)};
  sl_run_tasks(args->executor, args->batch * args->heads_q * args->n_q, differentiate_row, &pass);
  return pass.gradient;
}

/* The formula of ops/sluice/gated_attention.h in scalar C, in double precision, with no tricks: the specification
 * that every kernel is tested against, and what serves float64. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sluice/gated_attention.h>

#include "attention/dropout.h"
#include "attention/element.h"
#include "attention/pair_score.h"
#include "attention/validate.h"
#include "runtime/number.h"
#include "runtime/status.h"

static int64_t offset4(const sl_tensor4 *tensor, int64_t batch, int64_t head, int64_t token) {
  return batch * tensor->batch_stride + head * tensor->head_stride + token * tensor->token_stride;
}

static int64_t offset3(const sl_tensor3 *tensor, int64_t batch, int64_t head, int64_t token) {
  return batch * tensor->batch_stride + head * tensor->head_stride + token * tensor->token_stride;
}

/* Where a key lies: the places of the first and of the third dimension of k, v and b. */
typedef struct key_place {
  int64_t entry, token;
} key_place;

/* In a paged cache `entry` is a block; below 0 in a hole. */
static key_place find_key(const sl_gated_attention_args *args, int64_t batch, int64_t key) {
  if (!args->block_table) return (key_place){batch, key};
  return (key_place){args->block_table[batch * args->max_blocks + key / args->block_size], key % args->block_size};
}

static double clamp_logit(double logit) {
  if (logit > (double)SL_GATE_LOGIT_LIMIT) return (double)SL_GATE_LOGIT_LIMIT;
  if (logit < -(double)SL_GATE_LOGIT_LIMIT) return -(double)SL_GATE_LOGIT_LIMIT;
  return logit;
}

/* One query row: where its operands are, and what the formula gives for each of its keys. */
typedef struct query_row {
  const sl_gated_attention_args *args;
  sl_dtype gate_dtype;
  int64_t batch, head, head_kv, query, position;
  double *score;   /* [n_k]: s_ij, then P_ij; 0 for dropped pairs */
  double *gate;    /* [n_k]: g_ij */
  double *bend;    /* [n_k]: dr_ij / ds_ij */
  double *dropout; /* [n_k]: d_ij */
  char *kept;      /* [n_k] */
  char *near;      /* [n_k] */
  double lse;
} query_row;

static double gate_sum(const query_row *row, key_place place) {
  const sl_gated_attention_args *args = row->args;
  double a =
      clamp_logit(sl_element_load(row->gate_dtype, args->a.data, offset3(&args->a, row->batch, row->head, row->query)));
  double b = clamp_logit(
      sl_element_load(row->gate_dtype, args->b.data, offset3(&args->b, place.entry, row->head_kv, place.token)));
  return row->gate_dtype == SL_F64 ? a + b : (double)((float)a + (float)b);
}

static void choose_keys(query_row *row) {
  const sl_gated_attention_args *args = row->args;
  int64_t position = row->position;
  int64_t key_begin = args->key_range ? args->key_range[2 * row->batch] : 0;
  int64_t key_end = args->key_range ? args->key_range[2 * row->batch + 1] : args->n_k;
  int64_t text_begin = args->text_begin ? args->text_begin[row->batch] : key_begin;
  double threshold = args->logit_tau
                         ? sl_element_load(row->gate_dtype, args->logit_tau, row->batch * args->heads_q + row->head)
                         : -INFINITY;
  sl_dropout_row dropout = sl_dropout_of_row(args, row->batch, row->head, row->query);
  for (int64_t key = 0; key < args->n_k; ++key) {
    row->dropout[key] = sl_dropout_keeps(&dropout, (int32_t)key) ? 1 / (1 - args->dropout_p) : 0;
    row->kept[key] = 0;
    if (key < key_begin || key >= key_end) continue;
    key_place place = find_key(args, row->batch, key);
    if (place.entry < 0) continue;
    bool seen = sl_attention_pair_is_seen(args, row->batch, row->head, row->query, position, key);
    double z = gate_sum(row, place);
    row->near[key] = llabs(position - key) < args->window || key - text_begin < args->sinks;
    row->gate[key] = row->near[key] ? 1 : 1 / (1 + exp(-z));
    row->kept[key] = (char)(seen && (row->near[key] || !(z < threshold) || (args->causal && key == position)));
  }
}

/* Fills score with P_ij and lse; rows that keep nothing get lse = -inf. */
static void compute_softmax(query_row *row) {
  const sl_gated_attention_args *args = row->args;
  int64_t q_offset = offset4(&args->q, row->batch, row->head, row->query);
  double maximum = -INFINITY, sum = 0;
  for (int64_t key = 0; key < args->n_k; ++key) {
    row->score[key] = 0;
    if (!row->kept[key]) continue;
    key_place place = find_key(args, row->batch, key);
    int64_t k_offset = offset4(&args->k, place.entry, row->head_kv, place.token);
    double dot = 0;
    for (int64_t d = 0; d < args->head_dim; ++d) {
      dot += sl_element_load(args->dtype, args->q.data, q_offset + d) *
             sl_element_load(args->dtype, args->k.data, k_offset + d);
    }
    row->score[key] = sl_attention_bend_score(args, row->batch, row->head, row->query, row->position, key,
                                              dot * args->scale, row->bend + key);
    if (!(row->score[key] <= maximum)) maximum = row->score[key]; /* NaN goes through */
  }
  double shift = maximum == -INFINITY ? 0 : maximum;
  for (int64_t key = 0; key < args->n_k; ++key) {
    if (row->kept[key]) sum += row->score[key] = exp(row->score[key] - shift);
  }
  row->lse = shift + log(sum);
  for (int64_t key = 0; key < args->n_k && sum > 0; ++key) row->score[key] /= sum;
  if (isnan(sum)) {
    for (int64_t key = 0; key < args->n_k; ++key) {
      if (row->kept[key]) row->score[key] = NAN;
    }
  }
}

static sl_status make_row(const sl_gated_attention_args *args, query_row *row) {
  size_t keys = (size_t)(args->n_k ? args->n_k : 1);
  memset(row, 0, sizeof *row);
  row->args = args;
  row->gate_dtype = args->dtype == SL_F64 ? SL_F64 : SL_F32;
  row->score = malloc(keys * sizeof(double));
  row->gate = malloc(keys * sizeof(double));
  row->bend = malloc(keys * sizeof(double));
  row->dropout = malloc(keys * sizeof(double));
  row->kept = malloc(keys);
  row->near = malloc(keys);
  return row->score && row->gate && row->bend && row->dropout && row->kept && row->near
             ? SL_OK
             : sl_fail(SL_OUT_OF_MEMORY, "no memory for a row of n_k = %lld keys", (long long)args->n_k);
}

static void free_row(query_row *row) {
  free(row->score);
  free(row->gate);
  free(row->bend);
  free(row->dropout);
  free(row->kept);
  free(row->near);
}

static void place_row(query_row *row, int64_t batch, int64_t head, int64_t query) {
  row->batch = batch;
  row->head = head;
  row->head_kv = head / (row->args->heads_q / row->args->heads_kv);
  row->query = query;
  row->position = query + (row->args->q_offset ? row->args->q_offset[batch] : row->args->n_k - row->args->n_q);
  choose_keys(row);
  compute_softmax(row);
}

/* sigmoid(o) of one channel; 1 without a gate. */
static double output_gate(const sl_gated_attention_args *args, int64_t batch, int64_t head, int64_t query,
                          int64_t channel) {
  if (!args->output_gate.data) return 1;
  int64_t offset = offset4(&args->output_gate, batch, head, query) + (args->output_gate_channels == 1 ? 0 : channel);
  return 1 / (1 + exp(-sl_element_load(args->dtype, args->output_gate.data, offset)));
}

sl_status sl_gated_attention_reference(const sl_gated_attention_args *args) {
  SL_CHECK(sl_gated_attention_validate(args, SL_FORWARD_TENSORS));
  query_row row;
  sl_status status = make_row(args, &row);
  for (int64_t batch = 0; status == SL_OK && batch < args->batch; ++batch) {
    for (int64_t head = 0; head < args->heads_q; ++head) {
      for (int64_t query = 0; query < args->n_q; ++query) {
        place_row(&row, batch, head, query);
        for (int64_t d = 0; d < args->head_dim_v; ++d) {
          double sum = 0;
          for (int64_t key = 0; key < args->n_k; ++key) {
            if (!row.kept[key]) continue;
            key_place place = find_key(args, batch, key);
            int64_t v_offset = offset4(&args->v, place.entry, row.head_kv, place.token);
            double value = sl_element_load(args->dtype, args->v.data, v_offset + d);
            sum += row.score[key] * row.gate[key] * row.dropout[key] * value;
          }
          sum *= output_gate(args, batch, head, query, d);
          sl_element_store(args->dtype, args->out.data, offset4(&args->out, batch, head, query) + d, sum);
        }
        if (args->kept) {
          int32_t *kept = (int32_t *)args->kept + (batch * args->heads_q + head) * args->n_q + query;
          *kept = 0;
          for (int64_t key = 0; key < args->n_k; ++key) *kept += row.kept[key];
        }
        if (args->lse.data) {
          sl_element_store(row.gate_dtype, args->lse.data, offset3(&args->lse, batch, head, query), row.lse);
        }
      }
    }
  }
  free_row(&row);
  return status;
}

/* Gradients of one (batch, key head) are summed here in double and rounded once. */
typedef struct key_gradients {
  double *dk, *dv, *db;
} key_gradients;

static int64_t mask_gradient_offset(const sl_attention_mask *mask, int64_t batch, int64_t head, int64_t query,
                                    int64_t key) {
  return batch * mask->batch_stride + head * mask->head_stride + query * mask->query_stride + key * mask->key_stride;
}

static void clear_mask_gradient(const sl_gated_attention_args *args, sl_dtype dtype) {
  const sl_attention_mask *mask = &args->dattn_mask;
  for (int64_t batch = 0; mask->data && batch < (mask->batch_stride ? args->batch : 1); ++batch) {
    for (int64_t head = 0; head < (mask->head_stride ? args->heads_q : 1); ++head) {
      for (int64_t query = 0; query < (mask->query_stride ? args->n_q : 1); ++query) {
        for (int64_t key = 0; key < (mask->key_stride ? args->n_k : 1); ++key) {
          sl_element_store(dtype, mask->data, mask_gradient_offset(mask, batch, head, query, key), 0);
        }
      }
    }
  }
}

static void add_mask_gradient(const query_row *row, int64_t key, double ds) {
  const sl_attention_mask *mask = &row->args->dattn_mask;
  int64_t offset = mask_gradient_offset(mask, row->batch, row->head, row->query, key);
  sl_element_store(row->gate_dtype, mask->data, offset, sl_element_load(row->gate_dtype, mask->data, offset) + ds);
}

static void store_output_gate_gradient(const query_row *row) {
  const sl_gated_attention_args *args = row->args;
  int64_t out = offset4(&args->out, row->batch, row->head, row->query);
  int64_t dout = offset4(&args->dout, row->batch, row->head, row->query);
  int64_t target = offset4(&args->doutput_gate, row->batch, row->head, row->query);
  double sum = 0;
  for (int64_t d = 0; args->output_gate.data && d < args->head_dim_v; ++d) {
    double gate = output_gate(args, row->batch, row->head, row->query, d);
    double gradient = sl_element_load(args->dtype, args->dout.data, dout + d) *
                      sl_element_load(args->dtype, args->out.data, out + d) * (1 - gate);
    sum = args->output_gate_channels == 1 ? sum + gradient : gradient;
    sl_element_store(args->dtype, args->doutput_gate.data, target + (args->output_gate_channels == 1 ? 0 : d), sum);
  }
}

static void add_row_gradients(const query_row *row, double *dq, key_gradients sums) {
  const sl_gated_attention_args *args = row->args;
  int64_t D = args->head_dim, Dv = args->head_dim_v;
  int64_t q_offset = offset4(&args->q, row->batch, row->head, row->query);
  int64_t dout_offset = offset4(&args->dout, row->batch, row->head, row->query);
  int64_t out_offset = offset4(&args->out, row->batch, row->head, row->query);
  int64_t a_offset = offset3(&args->a, row->batch, row->head, row->query);
  double mean = 0, da = 0;
  for (int64_t d = 0; d < Dv; ++d) {
    mean += sl_element_load(args->dtype, args->dout.data, dout_offset + d) *
            sl_element_load(args->dtype, args->out.data, out_offset + d);
  }
  if (args->dlse.data) {
    mean -= sl_element_load(row->gate_dtype, args->dlse.data, offset3(&args->dlse, row->batch, row->head, row->query));
  }
  for (int64_t d = 0; d < D; ++d) dq[d] = 0;
  for (int64_t key = 0; key < args->n_k; ++key) {
    if (!row->kept[key]) continue;
    int64_t v_offset = offset4(&args->v, row->batch, row->head_kv, key);
    int64_t k_offset = offset4(&args->k, row->batch, row->head_kv, key);
    double p = row->score[key], g = row->gate[key], e = 0;
    for (int64_t d = 0; d < Dv; ++d) {
      double dout = sl_element_load(args->dtype, args->dout.data, dout_offset + d) *
                    output_gate(args, row->batch, row->head, row->query, d) * row->dropout[key];
      e += dout * sl_element_load(args->dtype, args->v.data, v_offset + d);
      sums.dv[key * Dv + d] += p * g * dout;
    }
    double ds = p * (g * e - mean);
    if (args->dattn_mask.data) add_mask_gradient(row, key, ds);
    ds *= row->bend[key] * args->scale;
    for (int64_t d = 0; d < D; ++d) {
      dq[d] += ds * sl_element_load(args->dtype, args->k.data, k_offset + d);
      sums.dk[key * D + d] += ds * sl_element_load(args->dtype, args->q.data, q_offset + d);
    }
    if (row->near[key]) continue;
    double dz = p * e * g * (1 - g);
    da += dz;
    sums.db[key] += dz;
  }
  for (int64_t d = 0; d < D; ++d) {
    sl_element_store(args->dtype, args->dq.data, offset4(&args->dq, row->batch, row->head, row->query) + d, dq[d]);
  }
  double a = sl_element_load(row->gate_dtype, args->a.data, a_offset);
  sl_element_store(row->gate_dtype, args->da.data, offset3(&args->da, row->batch, row->head, row->query),
                   fabs(a) > (double)SL_GATE_LOGIT_LIMIT ? 0 : da);
}

static void store_key_gradients(const query_row *row, key_gradients sums) {
  const sl_gated_attention_args *args = row->args;
  int64_t D = args->head_dim, Dv = args->head_dim_v;
  for (int64_t key = 0; key < args->n_k; ++key) {
    int64_t dk_offset = offset4(&args->dk, row->batch, row->head_kv, key);
    int64_t dv_offset = offset4(&args->dv, row->batch, row->head_kv, key);
    double b = sl_element_load(row->gate_dtype, args->b.data, offset3(&args->b, row->batch, row->head_kv, key));
    for (int64_t d = 0; d < D; ++d) sl_element_store(args->dtype, args->dk.data, dk_offset + d, sums.dk[key * D + d]);
    for (int64_t d = 0; d < Dv; ++d) sl_element_store(args->dtype, args->dv.data, dv_offset + d, sums.dv[key * Dv + d]);
    sl_element_store(row->gate_dtype, args->db.data, offset3(&args->db, row->batch, row->head_kv, key),
                     fabs(b) > (double)SL_GATE_LOGIT_LIMIT ? 0 : sums.db[key]);
  }
}

sl_status sl_gated_attention_backward_reference(const sl_gated_attention_args *args) {
  SL_CHECK(sl_gated_attention_validate(args, SL_BACKWARD_TENSORS));
  size_t keys = (size_t)args->n_k, width = (size_t)(args->head_dim + args->head_dim_v + 1);
  query_row row;
  sl_status status = make_row(args, &row);
  double *sums = malloc((keys * width + 1) * sizeof(double));
  double *dq = malloc((size_t)args->head_dim * sizeof(double));
  if (status == SL_OK && !(sums && dq)) {
    status = sl_fail(SL_OUT_OF_MEMORY, "no memory for the gradients of n_k = %lld keys", (long long)args->n_k);
  }
  if (status != SL_OK) goto out;
  key_gradients parts = {sums, sums + keys * (size_t)args->head_dim, sums + keys * (width - 1)};
  int64_t group = args->heads_q / args->heads_kv;
  clear_mask_gradient(args, row.gate_dtype);
  for (int64_t batch = 0; batch < args->batch; ++batch) {
    for (int64_t head_kv = 0; head_kv < args->heads_kv; ++head_kv) {
      memset(sums, 0, keys * width * sizeof(double));
      row.batch = batch;
      row.head_kv = head_kv;
      for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
        for (int64_t query = 0; query < args->n_q; ++query) {
          place_row(&row, batch, head, query);
          add_row_gradients(&row, dq, parts);
          store_output_gate_gradient(&row);
        }
      }
      store_key_gradients(&row, parts);
    }
  }
out:
  free(sums);
  free(dq);
  free_row(&row);
  return status;
}

/* Sums of the mask's gradient. */
#include "attention/mask_gradient.h"

#include "runtime/executor.h"

/* Whether every pair has an element of its own. */
static bool is_whole(const sl_gated_attention_args *args) {
  const sl_attention_mask *mask = &args->dattn_mask;
  return (mask->batch_stride || args->batch == 1) && (mask->head_stride || args->heads_q == 1) &&
         (mask->query_stride || args->n_q == 1) && (mask->key_stride || args->n_k == 1);
}

size_t sl_mask_gradient_bytes(const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  if (!args->dattn_mask.data || is_whole(args)) return 0;
  return (size_t)args->n_q * (size_t)args->n_k * sizeof(float);
}

static float *element(const sl_attention_mask *mask, int64_t batch, int64_t head, int64_t query) {
  return (float *)mask->data + batch * mask->batch_stride + head * mask->head_stride + query * mask->query_stride;
}

static void clear_row(void *context, int64_t worker, int64_t task) {
  (void)worker;
  const sl_gated_attention_args *args = context;
  const sl_attention_mask *mask = &args->dattn_mask;
  int64_t queries = mask->query_stride ? args->n_q : 1, heads = mask->head_stride ? args->heads_q : 1;
  float *row = element(mask, task / queries / heads, task / queries % heads, task % queries);
  for (int64_t key = 0; key < (mask->key_stride ? args->n_k : 1); ++key) row[key * mask->key_stride] = 0;
}

void sl_mask_gradient_clear(const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  const sl_attention_mask *mask = &args->dattn_mask;
  if (!mask->data) return;
  int64_t rows = (mask->batch_stride ? args->batch : 1) * (mask->head_stride ? args->heads_q : 1) *
                 (mask->query_stride ? args->n_q : 1);
  sl_run_tasks(args->executor, rows, clear_row, (void *)(uintptr_t)args);
}

sl_attention_mask sl_mask_gradient_of_head(const sl_attention_plan *plan, int64_t batch, int64_t head,
                                           float *workspace) {
  const sl_gated_attention_args *args = plan->args;
  sl_attention_mask of_head = args->dattn_mask;
  of_head.batch_stride = of_head.head_stride = 0;
  if (!of_head.data) return of_head;
  if (is_whole(args)) {
    of_head.data = element(&args->dattn_mask, batch, head, 0);
  } else {
    of_head = (sl_attention_mask){.data = workspace, .dtype = SL_F32, .query_stride = args->n_k, .key_stride = 1};
  }
  return of_head;
}

void sl_mask_gradient_add(const sl_attention_mask *of_head, const sl_query_rows *rows, const int32_t *keys,
                          int64_t count, const int32_t *lengths, const float *score_gradient, int64_t stride) {
  if (!of_head->data) return;
  for (int64_t r = 0; r < count; ++r) {
    float *target = element(of_head, 0, 0, rows->token[r]);
    const float *source = score_gradient + r * stride;
    for (int64_t j = 0; j < lengths[r]; ++j) target[keys[j] * of_head->key_stride] += source[j];
  }
}

/* What the tasks of a reduction share: each has the pairs of one row of queries. */
typedef struct reduction {
  const sl_attention_plan *plan;
  int64_t first, heads;
  const float *workspace;
} reduction;

static void reduce_row(void *context, int64_t worker, int64_t query) {
  (void)worker;
  const reduction *sums = context;
  const sl_gated_attention_args *args = sums->plan->args;
  const sl_attention_mask *mask = &args->dattn_mask;
  for (int64_t i = 0; i < sums->heads; ++i) {
    int64_t head = sums->first + i;
    const float *source = sums->workspace + (i * args->n_q + query) * args->n_k;
    float *target = element(mask, head / args->heads_q, head % args->heads_q, query);
    for (int64_t key = 0; key < args->n_k; ++key) target[key * mask->key_stride] += source[key];
  }
}

static void reduce_all(void *context, int64_t worker, int64_t task) {
  (void)task;
  const reduction *sums = context;
  for (int64_t query = 0; query < sums->plan->args->n_q; ++query) reduce_row(context, worker, query);
}

void sl_mask_gradient_reduce(const sl_attention_plan *plan, int64_t first, int64_t heads, const float *workspace) {
  if (sl_mask_gradient_bytes(plan) == 0) return;
  reduction sums = {plan, first, heads, workspace};
  bool rows_apart = plan->args->dattn_mask.query_stride != 0;
  sl_run_tasks(plan->args->executor, rows_apart ? plan->args->n_q : 1, rows_apart ? reduce_row : reduce_all, &sums);
}

/* The backward: keys are sorted and packed once per key head, in chunks; tasks take chunks of queries through them and
 * add to the sums of the keys in turns, so that the order of every sum is fixed; then the sums are stored. Key heads go
 * in waves, which bounds the memory. */
#include "attention/backward.h"

#include <string.h>

#include "attention/backward_queries.h"
#include "attention/output_gate.h"
#include "runtime/executor.h"
#include "runtime/status.h"

enum { WAVE_BYTES = 16 << 20, HEADS_PER_WORKER = 2 };

typedef struct backward_pass {
  const sl_attention_plan *plan;
  int64_t heads, wave;   /* key heads over all the batch; of them at the same time */
  int64_t chunks, tasks; /* of one key head, at most */
  size_t head_bytes, worker_bytes;
  char *head_memory, *worker_memory;
  size_t mask_bytes; /* of a key head */
  char *mask_memory;
  void *output_gate_memory;
  sl_key_head *key_heads; /* [wave] */
  int64_t first;          /* of the wave at hand */
  atomic_int status;      /* of the heads that the formula had to serve */
} backward_pass;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t count_parts(int64_t total, int64_t part) { return (total + part - 1) / part; }

/* Longer than the forward's, since five products a pair want fewer roundings to whole panels, and each chunk of queries
 * passes over the sums of the keys. */
sl_attention_plan sl_attention_make_backward_plan(const sl_gated_attention_args *args,
                                                  const sl_attention_kernel *kernel) {
  sl_attention_plan plan = sl_attention_make_plan(args, kernel);
  plan.chunk = args->n_k <= 512 ? 128 : args->n_k <= 1024 ? 256 : 512;
  plan.block = 64;
  plan.far_tile = sl_round_up(192, kernel->row_tile);
  plan.query_chunk = args->n_q <= 1024 ? plan.far_tile : 2 * plan.far_tile;
  plan.piece = plan.chunk < 128 ? plan.chunk : 128;
  return plan;
}

static void take_head(sl_key_head *head, sl_arena *arena, const backward_pass *pass) {
  const sl_attention_plan *plan = pass->plan;
  int64_t keys = plan->args->n_k;
  head->chunk = sl_arena_take(arena, pass->chunks, sizeof *head->chunk);
  head->place = sl_arena_take(arena, keys, sizeof *head->place);
  head->turns = sl_arena_take(arena, pass->tasks, sizeof *head->turns);
  for (int64_t i = 0; i < pass->chunks; ++i) {
    sl_gradient_chunk unplaced;
    sl_gradient_chunk_take(arena->base ? head->chunk + i : &unplaced, arena, plan, smaller(plan->chunk, keys));
  }
}

/* Cuts the workspace; on an empty arena, measures it. */
static void lay_out(backward_pass *pass, sl_arena *arena, const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  int64_t workers = sl_executor_workers(args->executor);
  memset(pass, 0, sizeof *pass);
  pass->plan = plan;
  pass->heads = args->batch * args->heads_kv;
  pass->chunks = count_parts(args->n_k, plan->chunk) + 2; /* two end before their time: at the sinks, at the grid */
  pass->tasks = plan->group * count_parts(args->n_q, plan->query_chunk);
  sl_arena measure = sl_arena_make(NULL, 0);
  sl_key_head head;
  take_head(&head, &measure, pass);
  pass->head_bytes = measure.used;
  measure = sl_arena_make(NULL, 0);
  sl_backward_worker worker;
  sl_backward_worker_take(&worker, &measure, plan);
  pass->worker_bytes = measure.used;
  pass->mask_bytes = sl_mask_gradient_bytes(plan) * (size_t)plan->group;
  int64_t head_bytes = (int64_t)(pass->head_bytes + pass->mask_bytes);
  int64_t wave = larger(WAVE_BYTES / larger(head_bytes, 1), HEADS_PER_WORKER * workers);
  pass->wave = smaller(wave, pass->heads);
  pass->key_heads = sl_arena_take(arena, pass->wave, sizeof *pass->key_heads);
  pass->head_memory = sl_arena_take(arena, pass->wave, pass->head_bytes);
  pass->worker_memory = sl_arena_take(arena, workers, pass->worker_bytes);
  pass->mask_memory = sl_arena_take(arena, pass->wave, pass->mask_bytes);
  pass->output_gate_memory = sl_arena_take(arena, 1, sl_output_gate_bytes(args));
}

sl_status sl_attention_backward_workspace(const sl_attention_plan *plan, size_t *bytes) {
  sl_arena arena = sl_arena_make(NULL, 0);
  backward_pass pass;
  lay_out(&pass, &arena, plan);
  SL_REQUIRE(!arena.overflow, SL_OUT_OF_RANGE, "the workspace for n_q = %lld and n_k = %lld does not fit into size_t",
             (long long)plan->args->n_q, (long long)plan->args->n_k);
  *bytes = arena.used;
  return SL_OK;
}

static void open_head(void *context, int64_t worker, int64_t task) {
  (void)worker;
  backward_pass *pass = context;
  const sl_attention_plan *plan = pass->plan;
  const sl_gated_attention_args *args = plan->args;
  sl_key_head *head = pass->key_heads + task;
  sl_arena arena = sl_arena_make(pass->head_memory + (size_t)task * pass->head_bytes, pass->head_bytes);
  take_head(head, &arena, pass);
  head->batch = (pass->first + task) / args->heads_kv;
  head->head_kv = (pass->first + task) % args->heads_kv;
  head->mask_gradient = (float *)(void *)(pass->mask_memory + (size_t)task * pass->mask_bytes);
  if (pass->mask_bytes) memset(head->mask_gradient, 0, pass->mask_bytes);
  sl_key_ranges ranges = sl_attention_key_ranges(plan, head->batch, head->head_kv, 0, args->n_q);
  head->bounds = ranges.bounds;
  head->grid = ranges.grid;
  head->sink_chunks = count_parts(head->bounds.sinks - head->bounds.begin, plan->chunk);
  head->chunks = head->sink_chunks + ranges.chunks;
  for (int64_t i = 0; i < pass->tasks; ++i) atomic_init(head->turns + i, 0);
  atomic_init(&head->flawed, false);
}

/* Sorts and packs one chunk, and clears its sums. A sorted chunk that no query meets whole is left in order of position
 * and unpacked: those who want a part of it pack that part themselves. */
static void open_chunk(void *context, int64_t worker, int64_t task) {
  (void)worker;
  backward_pass *pass = context;
  const sl_attention_plan *plan = pass->plan;
  sl_key_head *head = pass->key_heads + task / pass->chunks;
  int64_t number = task % pass->chunks;
  if (number >= head->chunks) return;
  bool sinks = number < head->sink_chunks;
  int64_t n_q = plan->args->n_q, first = (n_q - 1) / plan->query_chunk * plan->query_chunk;
  sl_key_ranges ranges = sl_attention_key_ranges(plan, head->batch, head->head_kv, first, n_q);
  sl_key_range range = sl_key_ranges_chunk(&ranges, plan, number - head->sink_chunks);
  if (sinks) {
    range.begin = head->bounds.begin + number * plan->chunk;
    range.end = smaller(range.begin + plan->chunk, head->bounds.sinks);
  }
  sl_gradient_chunk *chunk = head->chunk + number;
  bool sorted = !sinks && ranges.sorted;
  sl_key_chunk keys = chunk->keys;
  if (sorted && plan->args->causal && number - head->sink_chunks >= ranges.past_whole) {
    sorted = false;
    keys.k_columns = keys.v_columns = keys.k_depths = NULL;
  }
  sl_key_chunk_fill(&keys, plan, head->batch, head->head_kv, range.begin, range.end, sorted);
  chunk->keys = keys;
  for (int64_t j = 0; j < keys.count; ++j) head->place[keys.index[j]] = (int32_t)j;
  sl_gradient_chunk_clear(chunk, plan);
}

static void run_queries(void *context, int64_t worker_number, int64_t task) {
  backward_pass *pass = context;
  int64_t heads = smaller(pass->wave, pass->heads - pass->first);
  sl_backward_worker worker;
  sl_arena arena = sl_arena_make(pass->worker_memory + (size_t)worker_number * pass->worker_bytes, pass->worker_bytes);
  sl_backward_worker_take(&worker, &arena, pass->plan);
  sl_backward_run_queries(&worker, pass->plan, pass->key_heads + task % heads, task / heads);
}

static void clear_tokens(const sl_gated_attention_args *args, const sl_key_head *head, int64_t begin, int64_t end) {
  size_t size = sl_dtype_size(args->dtype);
  sl_token_rows dk = sl_attention_token_rows(args, &args->dk, head->batch, head->head_kv, args->head_dim);
  sl_token_rows dv = sl_attention_token_rows(args, &args->dv, head->batch, head->head_kv, args->head_dim_v);
  for (int64_t token = begin; token < end; ++token) {
    memset((char *)(uintptr_t)dk.data + token * dk.token_stride * (int64_t)size, 0, (size_t)dk.channels * size);
    memset((char *)(uintptr_t)dv.data + token * dv.token_stride * (int64_t)size, 0, (size_t)dv.channels * size);
    *sl_attention_at3(&args->db, head->batch, head->head_kv, token) = 0;
  }
}

static sl_tensor4 part4(sl_tensor4 tensor, sl_dtype dtype, int64_t batch, int64_t head) {
  int64_t offset = batch * tensor.batch_stride + head * tensor.head_stride;
  tensor.data = (char *)tensor.data + offset * (int64_t)sl_dtype_size(dtype);
  return tensor;
}

static sl_tensor3 part3(sl_tensor3 tensor, int64_t batch, int64_t head) {
  tensor.data = (float *)tensor.data + batch * tensor.batch_stride + head * tensor.head_stride;
  return tensor;
}

static sl_attention_mask part_of_mask(sl_attention_mask mask, int64_t batch, int64_t head) {
  int64_t offset = batch * mask.batch_stride + head * mask.head_stride;
  mask.data = (char *)mask.data + offset * (int64_t)sl_dtype_size(mask.dtype);
  return mask;
}

/* One key head by the reference, which knows where NaN and infinity belong. */
static sl_status run_reference(const sl_attention_plan *plan, const sl_key_head *head) {
  sl_gated_attention_args args = *plan->args;
  int64_t batch = head->batch, kv = head->head_kv, query_head = kv * plan->group;
  int64_t head_stride = sl_mask_gradient_bytes(plan) ? args.n_q * args.n_k : args.dattn_mask.head_stride;
  if (args.logit_tau) args.logit_tau = (const float *)args.logit_tau + batch * args.heads_q + query_head;
  if (args.key_range) args.key_range += 2 * batch;
  if (args.q_offset) args.q_offset += batch;
  if (args.text_begin) args.text_begin += batch;
  if (args.alibi_slopes) args.alibi_slopes = (const float *)args.alibi_slopes + batch * args.heads_q + query_head;
  if (args.attn_mask.data) args.attn_mask = part_of_mask(args.attn_mask, batch, query_head);
  if (args.dattn_mask.data) {
    args.dattn_mask = sl_mask_gradient_of_head(plan, batch, query_head, head->mask_gradient);
    args.dattn_mask.head_stride = head_stride;
  }
  args.dropout_first_row += (batch * args.heads_q + query_head) * args.n_q;
  args.batch = args.heads_kv = 1;
  args.heads_q = plan->group;
  args.q = part4(args.q, args.dtype, batch, query_head);
  args.k = part4(args.k, args.dtype, batch, kv);
  args.v = part4(args.v, args.dtype, batch, kv);
  args.out = part4(args.out, args.dtype, batch, query_head);
  args.dout = part4(args.dout, args.dtype, batch, query_head);
  if (args.output_gate.data) {
    args.output_gate = part4(args.output_gate, args.dtype, batch, query_head);
    args.doutput_gate = part4(args.doutput_gate, args.dtype, batch, query_head);
  }
  args.dq = part4(args.dq, args.dtype, batch, query_head);
  args.dk = part4(args.dk, args.dtype, batch, kv);
  args.dv = part4(args.dv, args.dtype, batch, kv);
  args.a = part3(args.a, batch, query_head);
  args.b = part3(args.b, batch, kv);
  args.lse = part3(args.lse, batch, query_head);
  if (args.dlse.data) args.dlse = part3(args.dlse, batch, query_head);
  args.da = part3(args.da, batch, query_head);
  args.db = part3(args.db, batch, kv);
  return sl_gated_attention_backward_reference(&args);
}

static void close_head(void *context, int64_t worker, int64_t task) {
  (void)worker;
  backward_pass *pass = context;
  const sl_attention_plan *plan = pass->plan;
  sl_key_head *head = pass->key_heads + task;
  for (int64_t i = 0; i < head->chunks; ++i) sl_key_head_store(head, plan, i);
  clear_tokens(plan->args, head, 0, head->bounds.begin);
  clear_tokens(plan->args, head, head->bounds.end, plan->args->n_k);
  if (!atomic_load_explicit(&head->flawed, memory_order_relaxed)) return;
  sl_status status = run_reference(plan, head);
  if (status != SL_OK) atomic_store_explicit(&pass->status, (int)status, memory_order_relaxed);
}

sl_status sl_attention_run_backward(const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  backward_pass pass;
  lay_out(&pass, &arena, plan);
  SL_REQUIRE(args->workspace && !arena.overflow && arena.used <= args->workspace_size, SL_OUT_OF_MEMORY,
             "workspace_size is %zu, expected at least %zu", args->workspace ? args->workspace_size : 0, arena.used);
  sl_attention_plan with_dout = *plan;
  with_dout.dout = sl_output_gate_differentiate(args, pass.output_gate_memory);
  pass.plan = &with_dout;
  sl_mask_gradient_clear(plan);
  for (pass.first = 0; pass.first < pass.heads; pass.first += pass.wave) {
    int64_t heads = smaller(pass.wave, pass.heads - pass.first);
    sl_run_tasks(args->executor, heads, open_head, &pass);
    sl_run_tasks(args->executor, heads * pass.chunks, open_chunk, &pass);
    sl_run_tasks(args->executor, heads * pass.tasks, run_queries, &pass);
    sl_run_tasks(args->executor, heads, close_head, &pass);
    sl_mask_gradient_reduce(plan, pass.first * plan->group, heads * plan->group,
                            (const float *)(void *)pass.mask_memory);
  }
  sl_status status = (sl_status)atomic_load(&pass.status);
  SL_REQUIRE(status == SL_OK, status, "no memory for the exact gradients of a head with non-finite values");
  return SL_OK;
}

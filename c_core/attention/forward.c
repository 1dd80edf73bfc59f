/* The tiled forward: keys are sorted and packed once per key head, in chunks; then each task takes a chunk of queries
 * through them. Key heads go in waves, so that the packed keys of a wave stay in the outer cache. */
#include "attention/forward.h"

#include <string.h>

#include "attention/key_ranges.h"
#include "attention/profile.h"
#include "attention/staircase.h"
#include "runtime/executor.h"
#include "runtime/status.h"

enum { WAVE_BYTES = 16 << 20, TASKS_PER_WORKER = 8 };

/* What one worker holds. */
typedef struct forward_worker {
  sl_query_rows rows, other; /* the query chunk, in two of the orders in which it meets keys */
  sl_key_chunk segment;      /* keys that are packed for this query chunk alone */
  sl_staircase staircase;
  int32_t *order;
} forward_worker;

typedef struct forward_pass {
  const sl_attention_plan *plan;
  int64_t heads, wave; /* key heads over all the batch; of them at the same time */
  int64_t chunks;      /* of one key head; 0: a single query chunk uses them, so each is packed when its turn comes */
  int64_t query_chunks;
  size_t chunk_bytes, worker_bytes;
  char *chunk_memory, *worker_memory;
  sl_key_chunk *key_chunks; /* [wave][chunks] */
  int64_t first;            /* of the wave at hand */
} forward_pass;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t count_parts(int64_t total, int64_t part) { return (total + part - 1) / part; }

static void take_worker(forward_worker *worker, sl_arena *arena, const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  int64_t rows = smaller(plan->query_chunk, args->n_q), keys = smaller(plan->chunk, args->n_k);
  sl_query_rows_take(&worker->rows, arena, plan, rows);
  sl_query_rows_take(&worker->other, arena, plan, rows);
  sl_key_chunk_take(&worker->segment, arena, plan, keys, SL_K_COLUMNS | SL_V_DEPTHS);
  sl_staircase_take(&worker->staircase, arena, plan);
  worker->order = sl_arena_take(arena, rows, sizeof(int32_t));
}

/* Cuts the workspace; on an empty arena, measures it. */
static void lay_out(forward_pass *pass, sl_arena *arena, const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  int64_t workers = sl_executor_workers(args->executor);
  memset(pass, 0, sizeof *pass);
  pass->plan = plan;
  pass->heads = args->batch * args->heads_kv;
  pass->query_chunks = count_parts(args->n_q, plan->query_chunk);
  pass->chunks = pass->query_chunks > 1 ? count_parts(args->n_k, plan->chunk) + 1 : 0;
  sl_arena measure = sl_arena_make(NULL, 0);
  sl_key_chunk chunk;
  sl_key_chunk_take(&chunk, &measure, plan, smaller(plan->chunk, args->n_k), SL_K_COLUMNS | SL_V_DEPTHS);
  pass->chunk_bytes = measure.used;
  measure = sl_arena_make(NULL, 0);
  forward_worker worker;
  take_worker(&worker, &measure, plan);
  pass->worker_bytes = measure.used;

  int64_t head_bytes = larger(pass->chunks * (int64_t)pass->chunk_bytes, 1);
  int64_t head_tasks = larger(plan->group * pass->query_chunks, 1);
  int64_t wave = larger(WAVE_BYTES / head_bytes, count_parts(TASKS_PER_WORKER * workers, head_tasks));
  pass->wave = smaller(larger(wave, 1), pass->heads);
  pass->key_chunks = sl_arena_take(arena, pass->wave * pass->chunks, sizeof(sl_key_chunk));
  pass->chunk_memory = sl_arena_take(arena, pass->wave * pass->chunks, pass->chunk_bytes);
  pass->worker_memory = sl_arena_take(arena, workers, pass->worker_bytes);
}

sl_status sl_attention_tiled_workspace(const sl_attention_plan *plan, size_t *bytes) {
  sl_arena arena = sl_arena_make(NULL, 0);
  forward_pass pass;
  lay_out(&pass, &arena, plan);
  SL_REQUIRE(!arena.overflow, SL_OUT_OF_RANGE, "the workspace for n_q = %lld and n_k = %lld does not fit into size_t",
             (long long)plan->args->n_q, (long long)plan->args->n_k);
  *bytes = arena.used;
  return SL_OK;
}

/* One chunk against all rows of the query chunk, `tile` at a time, while it is in the inner cache. */
static void attend_chunk(forward_worker *worker, const sl_attention_plan *plan, const sl_query_rows *rows,
                         const sl_key_chunk *chunk, sl_key_region region, int64_t tile) {
  for (int64_t row = 0; row < rows->count; row += tile) {
    sl_query_rows part = sl_query_rows_part(rows, plan, row, tile);
    sl_staircase_attend(&worker->staircase, &part, chunk, region);
  }
}

/* The same for keys that are packed for this query chunk alone, `piece` at a time. */
static void attend_segments(forward_worker *worker, const sl_attention_plan *plan, const sl_query_rows *rows,
                            sl_key_range keys, bool sorted, sl_key_region region, int64_t piece, int64_t tile) {
  for (int64_t begin = keys.begin; begin < keys.end; begin += piece) {
    sl_key_chunk_fill(&worker->segment, plan, rows->batch, rows->head_kv, begin, smaller(begin + piece, keys.end),
                      sorted);
    attend_chunk(worker, plan, rows, &worker->segment, region, tile);
  }
}

/* The same rows with their state in another order: each `tile` by falling a. */
static void reorder_rows(forward_worker *worker, const sl_attention_plan *plan, sl_query_rows *target,
                         const sl_query_rows *source, int64_t tile) {
  int64_t begun = sl_profile_start();
  for (int64_t first = 0; first < source->count; first += tile) {
    int64_t count = smaller(tile, source->count - first);
    sl_sort_falling(source->a + first, count, worker->order + first);
    for (int64_t i = 0; i < count; ++i) worker->order[first + i] += (int32_t)first;
  }
  sl_query_rows_gather(target, plan, source, worker->order, source->count);
  sl_profile_end(SL_PROFILE_ROWS, begun);
}

static void store_rows(sl_query_rows *rows, const sl_attention_plan *plan) {
  int64_t begun = sl_profile_start();
  sl_query_rows_store(rows, plan);
  sl_profile_end(SL_PROFILE_ROWS, begun);
}

/* Chunk i of the key head of rows: one of those packed for all, or packed now. */
static const sl_key_chunk *get_chunk(const forward_pass *pass, forward_worker *worker, const sl_query_rows *rows,
                                     const sl_key_ranges *ranges, int64_t i) {
  const sl_attention_plan *plan = pass->plan;
  int64_t head = rows->batch * plan->args->heads_kv + rows->head_kv;
  if (pass->chunks) return pass->key_chunks + (head - pass->first) * pass->chunks + i;
  sl_key_range keys = sl_key_ranges_chunk(ranges, plan, i);
  sl_key_chunk_fill(&worker->segment, plan, rows->batch, rows->head_kv, keys.begin, keys.end, ranges->sorted);
  return &worker->segment;
}

/* Every key is kept: rows and keys in order of position. */
static void run_unsorted(const forward_pass *pass, forward_worker *worker, const sl_key_ranges *ranges) {
  const sl_attention_plan *plan = pass->plan;
  const sl_gated_attention_args *args = plan->args;
  sl_query_rows *rows = &worker->rows;
  bool all = !args->causal && args->window == 0;
  sl_key_range sinks = {ranges->bounds.begin, ranges->bounds.sinks};
  attend_segments(worker, plan, rows, sinks, false, SL_REGION_SINKS, plan->chunk, plan->tile);
  for (int64_t i = 0; i < ranges->chunks; ++i) {
    if (args->causal && sl_key_ranges_chunk(ranges, plan, i).begin > ranges->last) break;
    const sl_key_chunk *chunk = get_chunk(pass, worker, rows, ranges, i);
    attend_chunk(worker, plan, rows, chunk, all ? SL_REGION_ALL : SL_REGION_PAST, plan->far_tile);
    if (args->window > 0) attend_chunk(worker, plan, rows, chunk, SL_REGION_NEAR, plan->near_tile);
    if (!args->causal && !all) attend_chunk(worker, plan, rows, chunk, SL_REGION_AFTER, plan->far_tile);
  }
  store_rows(rows, plan);
}

/* Near keys with rows in order of position, then the border between near and far with rows sorted among neighbours,
 * then far keys with rows sorted over the whole query chunk. */
static void run_sorted(const forward_pass *pass, forward_worker *worker, const sl_key_ranges *ranges) {
  const sl_attention_plan *plan = pass->plan;
  sl_query_rows *rows = &worker->rows, *other = &worker->other;
  sl_key_range sinks = {ranges->bounds.begin, ranges->bounds.sinks};
  attend_segments(worker, plan, rows, sinks, false, SL_REGION_SINKS, plan->chunk, plan->tile);
  if (plan->args->window > 0) {
    attend_segments(worker, plan, rows, ranges->near, false, SL_REGION_NEAR, plan->chunk, plan->near_tile);
    reorder_rows(worker, plan, other, rows, plan->tile);
    rows = &worker->other;
    other = &worker->rows;
  }
  attend_segments(worker, plan, rows, ranges->border_past, true, SL_REGION_PAST, plan->piece, plan->tile);
  attend_segments(worker, plan, rows, ranges->border_after, true, SL_REGION_AFTER, plan->piece, plan->tile);
  reorder_rows(worker, plan, other, rows, rows->count);
  attend_segments(worker, plan, other, ranges->past, true, SL_REGION_ALL, plan->chunk, plan->far_tile);
  attend_segments(worker, plan, other, ranges->after, true, SL_REGION_ALL, plan->chunk, plan->far_tile);
  for (int64_t i = 0; i < ranges->chunks; ++i) {
    if (i >= ranges->past_whole && i < ranges->after_whole) continue;
    attend_chunk(worker, plan, other, get_chunk(pass, worker, other, ranges, i), SL_REGION_ALL, plan->far_tile);
  }
  store_rows(other, plan);
}

static void run_queries(void *context, int64_t worker_number, int64_t task) {
  int64_t task_begun = sl_profile_start();
  const forward_pass *pass = context;
  const sl_attention_plan *plan = pass->plan;
  const sl_gated_attention_args *args = plan->args;
  int64_t heads = smaller(pass->wave, pass->heads - pass->first);
  int64_t tasks_per_chunk = heads * plan->group;
  int64_t number = task % tasks_per_chunk / plan->group;
  int64_t batch = (pass->first + number) / args->heads_kv, head_kv = (pass->first + number) % args->heads_kv;
  /* The last queries have the most keys: they go first. */
  int64_t begin = (pass->query_chunks - 1 - task / tasks_per_chunk) * plan->query_chunk;
  int64_t end = smaller(begin + plan->query_chunk, args->n_q);
  sl_key_ranges ranges = sl_attention_key_ranges(plan, batch, head_kv, begin, end);

  forward_worker worker;
  sl_arena arena = sl_arena_make(pass->worker_memory + (size_t)worker_number * pass->worker_bytes, pass->worker_bytes);
  take_worker(&worker, &arena, plan);
  int64_t begun = sl_profile_start();
  sl_query_rows_load(&worker.rows, plan, batch, head_kv * plan->group + task % plan->group, begin, end,
                     ranges.sorted && args->window == 0);
  sl_profile_end(SL_PROFILE_ROWS, begun);
  (ranges.sorted ? run_sorted : run_unsorted)(pass, &worker, &ranges);
  sl_profile_end(SL_PROFILE_BUSY, task_begun);
}

static void pack_keys(void *context, int64_t worker, int64_t task) {
  (void)worker;
  const forward_pass *pass = context;
  const sl_attention_plan *plan = pass->plan;
  const sl_gated_attention_args *args = plan->args;
  int64_t head = pass->first + task / pass->chunks, number = task % pass->chunks;
  int64_t batch = head / args->heads_kv, head_kv = head % args->heads_kv;
  int64_t last = (pass->query_chunks - 1) * plan->query_chunk;
  sl_key_ranges ranges = sl_attention_key_ranges(plan, batch, head_kv, last, args->n_q);
  if (number >= ranges.chunks) return;
  /* A sorted chunk that is not whole for the last queries is not whole for any. */
  if (args->causal && ranges.sorted && number >= ranges.past_whole) return;
  int64_t begun = sl_profile_start();
  sl_key_chunk *chunk = pass->key_chunks + task;
  sl_arena arena = sl_arena_make(pass->chunk_memory + (size_t)task * pass->chunk_bytes, pass->chunk_bytes);
  sl_key_chunk_take(chunk, &arena, plan, smaller(plan->chunk, args->n_k), SL_K_COLUMNS | SL_V_DEPTHS);
  sl_key_range keys = sl_key_ranges_chunk(&ranges, plan, number);
  sl_key_chunk_fill(chunk, plan, batch, head_kv, keys.begin, keys.end, ranges.sorted);
  sl_profile_end(SL_PROFILE_BUSY, begun);
}

sl_status sl_attention_run_tiled(const sl_attention_plan *plan) {
  const sl_gated_attention_args *args = plan->args;
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  forward_pass pass;
  lay_out(&pass, &arena, plan);
  SL_REQUIRE(args->workspace && !arena.overflow && arena.used <= args->workspace_size, SL_OUT_OF_MEMORY,
             "workspace_size is %zu, expected at least %zu", args->workspace ? args->workspace_size : 0, arena.used);
  for (pass.first = 0; pass.first < pass.heads; pass.first += pass.wave) {
    int64_t heads = smaller(pass.wave, pass.heads - pass.first);
    sl_run_tasks(args->executor, heads * pass.chunks, pack_keys, &pass);
    sl_run_tasks(args->executor, heads * plan->group * pass.query_chunks, run_queries, &pass);
  }
  return SL_OK;
}

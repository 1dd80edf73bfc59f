/* The tiled forward: keys are sorted and packed once per key head, in chunks; then each task takes a chunk of queries
 * through them. Key heads go in waves, so that the packed keys of a wave stay in the outer cache. */
#include "attention/forward.h"

#include <string.h>

#include "attention/staircase.h"
#include "runtime/executor.h"
#include "runtime/status.h"

enum { WAVE_BYTES = 16 << 20, TASKS_PER_WORKER = 8 };

/* What one worker holds. */
typedef struct forward_worker {
  sl_query_rows rows, far_rows; /* of the query chunk in tiles of neighbours; of one tile sorted over all of it */
  sl_key_chunk segment;         /* keys that only this query chunk needs, piece by piece */
  sl_key_chunk past, after;     /* keys between the last whole chunk and the query chunk, and behind it */
  sl_staircase staircase;
  int32_t *order;
} forward_worker;

typedef struct forward_pass {
  const sl_attention_plan *plan;
  int64_t heads, wave; /* key heads over all the batch; of them at the same time */
  int64_t chunks;      /* of one key head */
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
  sl_query_rows_take(&worker->far_rows, arena, plan, rows);
  sl_key_chunk_take(&worker->segment, arena, plan, keys, SL_K_COLUMNS | SL_V_DEPTHS);
  sl_key_chunk_take(&worker->past, arena, plan, keys, SL_K_COLUMNS | SL_V_DEPTHS);
  bool after = !args->causal && args->window > 0;
  sl_key_chunk_take(&worker->after, arena, plan, after ? keys : 0, SL_K_COLUMNS | SL_V_DEPTHS);
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
  pass->chunks = count_parts(args->n_k, plan->chunk);
  pass->query_chunks = count_parts(args->n_q, plan->query_chunk);
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

/* Where the positions of a query chunk [begin, end) lie, and the distance from which on a key is far. */
typedef struct task_range {
  int64_t batch, head, head_kv, begin, end;
  int64_t first, last; /* positions of the first and the last query */
  int64_t past, after; /* far before a row is position - past and less; far behind it, position + after and more */
  sl_key_bounds bounds;
  bool sorted;
} task_range;

static task_range make_range(const forward_pass *pass, int64_t head, int64_t group_head, int64_t query_chunk) {
  const sl_attention_plan *plan = pass->plan;
  const sl_gated_attention_args *args = plan->args;
  task_range range = {.batch = head / args->heads_kv, .head_kv = head % args->heads_kv};
  range.head = range.head_kv * plan->group + group_head;
  range.begin = query_chunk * plan->query_chunk;
  range.end = smaller(range.begin + plan->query_chunk, args->n_q);
  range.first = range.begin + args->n_k - args->n_q;
  range.last = range.end - 1 + args->n_k - args->n_q;
  range.sorted = sl_attention_drops_pairs(plan, range.batch, range.head_kv);
  range.bounds = sl_attention_key_bounds(args, range.batch);
  int64_t window = smaller(args->window, args->n_k + args->n_q);
  range.after = window;
  range.past = args->causal && range.sorted ? larger(window, 1) : window;
  return range;
}

/* Keys [begin, end) of the region, a piece at a time, against all rows of the query chunk. */
static void attend_segments(const forward_pass *pass, forward_worker *worker, const task_range *range, int64_t begin,
                            int64_t end, bool sorted, sl_key_region region) {
  const sl_attention_plan *plan = pass->plan;
  int64_t piece = sorted ? plan->piece : plan->chunk;
  for (; begin < end; begin += piece) {
    sl_key_chunk_fill(&worker->segment, plan, range->batch, range->head_kv, begin, smaller(begin + piece, end), sorted);
    for (int64_t row = 0; row < worker->rows.count; row += plan->tile) {
      sl_query_rows tile = sl_query_rows_part(&worker->rows, plan, row, plan->tile);
      sl_staircase_attend(&worker->staircase, &tile, &worker->segment, region);
    }
  }
}

/* One chunk against all rows of the query chunk, while it is in the inner cache. */
static void attend_far(const forward_pass *pass, forward_worker *worker, const sl_query_rows *rows,
                       const sl_key_chunk *chunk, sl_key_region region) {
  for (int64_t row = 0; row < rows->count; row += pass->plan->far_tile) {
    sl_query_rows tile = sl_query_rows_part(rows, pass->plan, row, pass->plan->far_tile);
    sl_staircase_attend(&worker->staircase, &tile, chunk, region);
  }
}

/* Chunks in order of position, straight through. */
static void attend_unsorted(const forward_pass *pass, forward_worker *worker, const sl_key_chunk *chunks, int64_t count,
                            const task_range *range) {
  const sl_attention_plan *plan = pass->plan;
  const sl_gated_attention_args *args = plan->args;
  bool all = !args->causal && range->after == 0;
  for (int64_t i = 0; i < count; ++i) {
    attend_far(pass, worker, &worker->rows, chunks + i, all ? SL_REGION_ALL : SL_REGION_PAST);
    if (args->window > 0) attend_far(pass, worker, &worker->rows, chunks + i, SL_REGION_NEAR);
    if (!args->causal && !all) attend_far(pass, worker, &worker->rows, chunks + i, SL_REGION_AFTER);
  }
  sl_query_rows_store(&worker->rows, plan);
}

/* Whole sorted chunks, and what is left of them at the query chunk's borders, against rows sorted over all of it. */
static void attend_sorted(const forward_pass *pass, forward_worker *worker, const sl_key_chunk *chunks, int64_t count,
                          const task_range *range) {
  const sl_attention_plan *plan = pass->plan;
  const sl_gated_attention_args *args = plan->args;
  int64_t base = range->bounds.sinks, end = range->bounds.end;
  bool all = !args->causal && range->after == 0;
  int64_t past_end = all ? end : smaller(larger(range->first - range->past + 1, base), end);
  int64_t past_whole = past_end == end ? count : (past_end - base) / plan->chunk;
  int64_t past_begin = smaller(base + past_whole * plan->chunk, past_end);
  int64_t after_begin = args->causal || all ? end : smaller(larger(range->last + range->after, base), end);
  int64_t after_whole = count_parts(after_begin - base, plan->chunk);
  int64_t after_end = smaller(base + after_whole * plan->chunk, end);
  sl_key_chunk_fill(&worker->past, plan, range->batch, range->head_kv, past_begin, past_end, true);
  if (after_begin < after_end) {
    sl_key_chunk_fill(&worker->after, plan, range->batch, range->head_kv, after_begin, after_end, true);
  }
  sl_sort_falling(worker->rows.a, worker->rows.count, worker->order);
  sl_query_rows_gather(&worker->far_rows, plan, &worker->rows, worker->order, worker->rows.count);
  attend_far(pass, worker, &worker->far_rows, &worker->past, SL_REGION_ALL);
  if (after_begin < after_end) attend_far(pass, worker, &worker->far_rows, &worker->after, SL_REGION_ALL);
  for (int64_t i = 0; i < count; ++i) {
    if (i < past_whole || i >= after_whole) attend_far(pass, worker, &worker->far_rows, chunks + i, SL_REGION_ALL);
  }
  sl_query_rows_store(&worker->far_rows, plan);
}

static void run_queries(void *context, int64_t worker_number, int64_t task) {
  const forward_pass *pass = context;
  const sl_attention_plan *plan = pass->plan;
  const sl_gated_attention_args *args = plan->args;
  int64_t heads = smaller(pass->wave, pass->heads - pass->first);
  int64_t tasks_per_chunk = heads * plan->group;
  int64_t head = task % tasks_per_chunk / plan->group;
  /* The last queries have the most keys: they go first. */
  task_range range =
      make_range(pass, pass->first + head, task % plan->group, pass->query_chunks - 1 - task / tasks_per_chunk);
  const sl_key_chunk *chunks = pass->key_chunks + head * pass->chunks;
  int64_t count = count_parts(range.bounds.end - range.bounds.sinks, plan->chunk);

  forward_worker worker;
  sl_arena arena = sl_arena_make(pass->worker_memory + (size_t)worker_number * pass->worker_bytes, pass->worker_bytes);
  take_worker(&worker, &arena, plan);
  sl_query_rows_load(&worker.rows, plan, range.batch, range.head, range.begin, range.end, range.sorted);
  attend_segments(pass, &worker, &range, range.bounds.begin, range.bounds.sinks, false, SL_REGION_SINKS);
  if (!range.sorted) {
    attend_unsorted(pass, &worker, chunks, count, &range);
    return;
  }
  int64_t base = range.bounds.sinks, end = range.bounds.end;
  if (args->window > 0) {
    int64_t near_end = args->causal ? range.last + 1 : range.last + range.after;
    attend_segments(pass, &worker, &range, larger(range.first - range.after + 1, base), smaller(near_end, end), false,
                    SL_REGION_NEAR);
  }
  if (range.past > 0) {
    attend_segments(pass, &worker, &range, larger(range.first - range.past + 1, base),
                    smaller(range.last - range.past + 1, end), true, SL_REGION_PAST);
  }
  if (!args->causal && range.after > 0) {
    attend_segments(pass, &worker, &range, larger(range.first + range.after, base),
                    smaller(range.last + range.after, end), true, SL_REGION_AFTER);
  }
  attend_sorted(pass, &worker, chunks, count, &range);
}

static void pack_keys(void *context, int64_t worker, int64_t task) {
  (void)worker;
  const forward_pass *pass = context;
  const sl_attention_plan *plan = pass->plan;
  int64_t head = task / pass->chunks, number = task % pass->chunks;
  task_range range = make_range(pass, pass->first + head, 0, pass->query_chunks - 1);
  int64_t begin = range.bounds.sinks + number * plan->chunk, end = smaller(begin + plan->chunk, range.bounds.end);
  if (begin >= end) return;
  /* A sorted chunk that reaches beyond the past of the last queries is never wanted whole. */
  if (plan->args->causal && range.sorted && end - 1 > range.first - range.past) return;
  sl_key_chunk *chunk = pass->key_chunks + task;
  sl_arena arena = sl_arena_make(pass->chunk_memory + (size_t)task * pass->chunk_bytes, pass->chunk_bytes);
  sl_key_chunk_take(chunk, &arena, plan, smaller(plan->chunk, plan->args->n_k), SL_K_COLUMNS | SL_V_DEPTHS);
  sl_key_chunk_fill(chunk, plan, range.batch, range.head_kv, begin, end, range.sorted);
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

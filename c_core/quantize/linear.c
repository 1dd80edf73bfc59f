/* linear_dynamic: quantises the rows of x into what the kernel reads, then multiplies row blocks by panels. */
#include <stddef.h>
#include <string.h>

#include "quantize/linear.h"
#include "quantize/panel.h"
#include "quantize/validate.h"
#include "runtime/executor.h"
#include "runtime/status.h"

enum {
  MOST_BLOCK_ROWS = 96,
  BLOCK_BYTES = 384 << 10, /* activations of a row block: what a second-level cache holds beside a panel */
  TASKS = 16,              /* at least so many, so that workers of unequal speed end together */
  MOST_TASK_ROWS = 8,
};

/* A worker's scratch memory in a row block times a panel. */
typedef struct block_scratch {
  float *tile;              /* [block rows * 2, SL_QUANTIZE_PANEL] */
  float *scale;             /* [block rows, planes] */
  float *outlier_weight;    /* [most outliers, SL_QUANTIZE_PANEL] */
  const void **activations; /* [block rows * 2] */
  const int32_t **sums;     /* [block rows * 2] */
  int32_t *place;           /* [block rows * 2] */
  char *unpacked;           /* SL_PANEL_SCRATCH bytes */
} block_scratch;

static block_scratch cut_scratch(const sl_linear_run *run, sl_arena *arena) {
  int64_t most = run->rows.outlier_ratio > 0 ? sl_most_outliers(run->rows.columns) : 0, rows = run->block_rows * 2;
  block_scratch scratch;
  scratch.tile = sl_arena_take(arena, rows * SL_QUANTIZE_PANEL, sizeof(float));
  scratch.scale = sl_arena_take(arena, rows, sizeof(float));
  scratch.outlier_weight = sl_arena_take(arena, most * SL_QUANTIZE_PANEL, sizeof(float));
  scratch.activations = sl_arena_take(arena, rows, sizeof(void *));
  scratch.sums = sl_arena_take(arena, rows, sizeof(int32_t *));
  scratch.place = sl_arena_take(arena, rows, sizeof(int32_t));
  scratch.unpacked = sl_arena_take(arena, SL_PANEL_SCRATCH, 1);
  return scratch;
}

sl_status sl_linear_prepare(const sl_linear_dynamic_args *args, sl_dtype out_dtype, sl_arena *arena,
                            sl_linear_run *run) {
  memset(run, 0, sizeof *run);
  run->args = args, run->out_dtype = out_dtype;
  run->kernel = sl_quantize_find_kernel();
  run->wide = sl_rows_are_wide(run->kernel, args->weight.bits);
  int64_t inputs = sl_padded_inputs(&args->weight), rows = args->rows;
  int64_t panels = sl_ceil_divide(args->weight.out_features, SL_QUANTIZE_PANEL);
  int64_t workers = sl_executor_workers(args->executor);
  run->row_bytes =
      sl_round_up(2 * inputs, 64) + 64; /* not a power of two, which would put all rows into one set of a cache */
  run->segments = sl_count_segments(&args->weight);
  run->block_rows = inputs > 0 ? BLOCK_BYTES / run->row_bytes : MOST_BLOCK_ROWS;
  if (run->block_rows > MOST_BLOCK_ROWS) run->block_rows = MOST_BLOCK_ROWS;
  if (run->block_rows < 2 * SL_QUANTIZE_TILE_ROWS) run->block_rows = 2 * SL_QUANTIZE_TILE_ROWS;
  int64_t blocks = sl_ceil_divide(rows, run->block_rows);
  if (blocks > 0) run->block_rows = sl_ceil_divide(rows, blocks);
  run->column_chunks = blocks > 0 ? sl_ceil_divide(TASKS, blocks) : 1;
  if (run->column_chunks > panels) run->column_chunks = panels;
  run->task_rows = sl_ceil_divide(rows, TASKS);
  if (run->task_rows > MOST_TASK_ROWS) run->task_rows = MOST_TASK_ROWS;
  if (run->task_rows < 1) run->task_rows = 1;

  sl_rows *source = &run->rows;
  source->kernel = run->kernel, source->executor = args->executor;
  source->dtype = args->dtype, source->x = args->x, source->rows = rows, source->columns = args->weight.in_features;
  source->activation_bits = args->activation_bits, source->target_sqnr = args->target_sqnr;
  source->per_token = args->per_token, source->outlier_ratio = args->outlier_ratio;
  sl_take_rows_workspace(source, arena);
  int64_t most = source->outlier_ratio > 0 ? sl_most_outliers(source->columns) : 0;
  run->activations = sl_arena_take(arena, rows, (size_t)run->row_bytes);
  run->scale = sl_arena_take(arena, rows, 2 * sizeof(float));
  run->sums = sl_arena_take(arena, rows * 2, (size_t)run->segments * sizeof(int32_t));
  run->outliers = sl_arena_take(arena, rows * most, sizeof(float));
  run->integers = sl_arena_take(arena, workers, (size_t)inputs * sizeof(int16_t));
  sl_arena measured = sl_arena_make(NULL, 0);
  cut_scratch(run, &measured);
  run->scratch_bytes = (int64_t)measured.used;
  run->scratch = sl_arena_take(arena, workers, measured.used);
  SL_REQUIRE(!arena->overflow, SL_OUT_OF_RANGE,
             "rows is %lld with %lld in_features: the workspace would exceed the address space", (long long)rows,
             (long long)args->weight.in_features);
  return SL_OK;
}

sl_status sl_linear_dynamic_workspace_size(const sl_linear_dynamic_args *args, size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(sl_quantize_validate_linear(args, false));
  sl_arena arena = sl_arena_make(NULL, 0);
  sl_linear_run run;
  SL_CHECK(sl_linear_prepare(args, args->dtype, &arena, &run));
  *bytes = arena.used;
  return SL_OK;
}

void sl_linear_quantize_row(const sl_linear_run *run, int64_t worker, int64_t row) {
  const sl_quantized_weight *weight = &run->args->weight;
  int64_t inputs = sl_padded_inputs(weight), columns = weight->in_features;
  char *activations = run->activations + row * run->row_bytes;
  int16_t *q = run->integers + worker * inputs;
  float *scale = run->scale + 2 * row;
  float *outliers = run->rows.outliers ? run->outliers + row * run->rows.outliers : NULL;
  int bits = sl_quantize_row(&run->rows, worker, row, q, &scale[0], outliers);
  run->args->bits[row] = (int8_t)bits;
  scale[1] = 0;
  if (inputs > columns) memset(q + columns, 0, (size_t)(inputs - columns) * sizeof(int16_t));
  if (sl_row_is_wide(run->kernel, weight->bits, bits)) {
    memcpy(activations, q, (size_t)inputs * sizeof(int16_t));
    return;
  }
  int8_t *low = (int8_t *)activations, *high = bits == 16 ? low + inputs : NULL; /* 16 bits: not in a wide run */
  run->kernel->narrow_row(q, inputs, high, low);
  int32_t *sums = run->sums + 2 * row * run->segments;
  sl_sum_segments(run->kernel, weight, low, sums);
  if (high) {
    scale[1] = 256 * scale[0];
    sl_sum_segments(run->kernel, weight, high, sums + run->segments);
  }
}

static void quantize_task(void *context, int64_t worker, int64_t task) {
  const sl_linear_run *run = context;
  int64_t end = (task + 1) * run->task_rows < run->args->rows ? (task + 1) * run->task_rows : run->args->rows;
  for (int64_t row = task * run->task_rows; row < end; ++row) sl_linear_quantize_row(run, worker, row);
}

/* Columns of the panel that belong to outlier channels, as float32. */
static void read_outlier_weights(const sl_linear_run *run, int64_t panel, float *out) {
  const sl_quantized_weight *weight = &run->args->weight;
  for (int64_t i = 0; i < run->rows.outliers; ++i) {
    int64_t input = run->rows.outlier_channels[i];
    for (int c = 0; c < SL_QUANTIZE_PANEL; ++c) {
      int64_t output = panel * SL_QUANTIZE_PANEL + c;
      out[i * SL_QUANTIZE_PANEL + c] =
          sl_packed_scale(weight, 0, output, input) * (float)sl_packed_weight(weight, 0, output, input);
    }
  }
}

/* The rows of a block that are int8_t, then those that are int16_t; returns how many the first are. */
static int64_t list_wide_rows(const sl_linear_run *run, int64_t first, int64_t rows, const block_scratch *scratch) {
  const sl_quantized_weight *weight = &run->args->weight;
  int64_t narrow = 0, listed = 0;
  for (int wide = 0; wide < 2; ++wide) {
    for (int64_t i = 0; i < rows; ++i) {
      int64_t row = first + i;
      if (sl_row_is_wide(run->kernel, weight->bits, run->args->bits[row]) != (wide == 1)) continue;
      scratch->activations[listed] = run->activations + row * run->row_bytes;
      scratch->sums[listed] = run->sums + 2 * row * run->segments;
      scratch->scale[i] = run->scale[2 * row];
      scratch->place[i] = (int32_t)listed++;
    }
    if (!wide) narrow = listed;
  }
  return narrow;
}

/* The rows of a block as planes, for sl_multiply_panel(); returns how many planes each has. */
static int list_planes(const sl_linear_run *run, int64_t first, int64_t rows, const block_scratch *scratch) {
  int planes = 1;
  for (int64_t i = 0; i < rows; ++i) {
    if (run->args->bits[first + i] == 16) planes = 2;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int plane = 0; plane < planes; ++plane) {
      int64_t at = i * planes + plane;
      /* A row without a second plane repeats its first, times 0. */
      int source = run->args->bits[first + i] == 16 ? plane : 0;
      const char *activations = run->activations + (first + i) * run->row_bytes;
      scratch->activations[at] = activations + source * sl_padded_inputs(&run->args->weight);
      scratch->scale[at] = run->scale[2 * (first + i) + plane];
      scratch->sums[at] = run->sums + (2 * (first + i) + source) * run->segments;
    }
  }
  return planes;
}

void sl_linear_multiply(const sl_linear_run *run, int64_t worker, int64_t task, int64_t all_rows) {
  const sl_linear_dynamic_args *args = run->args;
  const sl_quantized_weight *weight = &args->weight;
  int64_t block = task / run->column_chunks, chunk = task % run->column_chunks;
  int64_t first = block * run->block_rows, rows = all_rows - first;
  if (rows <= 0) return;
  if (rows > run->block_rows) rows = run->block_rows;
  int64_t panels = sl_ceil_divide(weight->out_features, SL_QUANTIZE_PANEL);
  sl_arena arena = sl_arena_make(run->scratch + worker * run->scratch_bytes, (size_t)run->scratch_bytes);
  block_scratch scratch = cut_scratch(run, &arena);

  int planes = run->wide ? 1 : list_planes(run, first, rows, &scratch);
  int64_t narrow = run->wide ? list_wide_rows(run, first, rows, &scratch) : rows * planes;
  sl_panel_product product = {0}, wide;
  product.kernel = run->kernel, product.weight = weight, product.rows = narrow;
  product.activations = scratch.activations, product.sums = scratch.sums;
  product.unpacked = scratch.unpacked, product.tile = scratch.tile;
  wide = product;
  wide.wide = true, wide.rows = rows * planes - narrow;
  wide.activations += narrow, wide.tile += narrow * SL_QUANTIZE_PANEL;
  sl_quantize_finish finish = {0};
  finish.rows = rows, finish.planes = planes, finish.tile = scratch.tile, finish.scale = scratch.scale;
  finish.place = run->wide ? scratch.place : NULL;
  finish.outliers = run->rows.outliers, finish.outlier_weight = scratch.outlier_weight;
  if (finish.outliers) finish.outlier = run->outliers + first * finish.outliers;
  finish.dtype = run->out_dtype, finish.row_stride = weight->out_features, finish.channel_stride = 1;
  int64_t end = panels * (chunk + 1) / run->column_chunks;
  for (int64_t panel = panels * chunk / run->column_chunks; panel < end; ++panel) {
    int64_t channel = panel * SL_QUANTIZE_PANEL, left = weight->out_features - channel;
    float bias[SL_QUANTIZE_PANEL];
    sl_set_panel_channels(&finish, left, args->bias ? args->bias + channel : NULL, bias);
    int64_t at = first * weight->out_features + channel;
    finish.out = (char *)args->out + at * (int64_t)sl_value_size(run->out_dtype);
    read_outlier_weights(run, panel, scratch.outlier_weight);
    if (product.rows > 0) sl_multiply_panel(&product, panel);
    if (wide.rows > 0) sl_multiply_panel(&wide, panel);
    run->kernel->finish(&finish);
  }
}

static void multiply_task(void *context, int64_t worker, int64_t task) {
  const sl_linear_run *run = context;
  sl_linear_multiply(run, worker, task, run->args->rows);
}

void sl_linear_run_all(sl_linear_run *run) {
  const sl_linear_dynamic_args *args = run->args;
  if (args->rows == 0) return;
  sl_stage stages[SL_MEASURE_STAGES + 2];
  int count = sl_list_measure_stages(&run->rows, stages);
  stages[count++] = (sl_stage){sl_ceil_divide(args->rows, run->task_rows), quantize_task, NULL, run};
  stages[count++] = (sl_stage){sl_linear_blocks(run) * run->column_chunks, multiply_task, NULL, run};
  /* A multiplication is some thirty times as fast as the measure of an element that sl_executor_for() has in mind. */
  int64_t work = args->rows * args->weight.in_features * (args->weight.out_features / 32 + 1);
  sl_run_stages(sl_executor_for(args->executor, work), stages, count);
}

sl_status sl_linear_dynamic(const sl_linear_dynamic_args *args) {
  SL_CHECK(sl_quantize_validate_linear(args, true));
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  sl_linear_run run;
  SL_CHECK(sl_linear_prepare(args, args->dtype, &arena, &run));
  SL_REQUIRE(args->workspace && arena.used <= args->workspace_size, SL_OUT_OF_MEMORY,
             "workspace_size is %zu, expected at least %zu", args->workspace ? args->workspace_size : 0, arena.used);
  sl_linear_run_all(&run);
  return SL_OK;
}

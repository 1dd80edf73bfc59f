/* lstm_dynamic and gru_dynamic: one product for the inputs of all steps, then round after round of the state's product
 * and the gates. Sequences are rows of the state, which stays in its place: those that take part in a step are its
 * first. */
#include <stddef.h>
#include <string.h>

#include "quantize/linear.h"
#include "quantize/validate.h"
#include "runtime/executor.h"
#include "runtime/status.h"

enum {
  TASKS_OF_WORKER = 4, /* at least so many, so that workers of unequal speed end together */
  /* Multiplications of a step that are worth waiting for one another: some ten microseconds. */
  PARALLEL_WORK = 1 << 19,
};

typedef struct recurrent_run {
  const sl_recurrent_dynamic_args *args;
  const sl_executor *executor; /* of the rounds */
  int64_t gate_columns, state_size;
  bool lstm;
  int64_t row_tasks;
  /* Each product's arguments are read by its run. */
  sl_linear_dynamic_args input_args, hidden_args, projection_args;
  sl_linear_run input, hidden, projection;
  /* Workspace. */
  int64_t *offsets;         /* [steps]: the first row of each step */
  float *input_gates;       /* [rows, gate_columns] */
  float *hidden_gates;      /* [batch, gate_columns] */
  float *state;             /* [batch, state_size] */
  float *cell;              /* [batch, hidden_size]; LSTM only */
  float *unprojected;       /* [batch, hidden_size]: o * tanh(c), with a projection */
  int8_t *state_bits;       /* [batch] */
  int8_t *unprojected_bits; /* [batch] */
} recurrent_run;

/* A product of the state, whose rows are float32, with as many tasks as suit the threads. */
static sl_status prepare_step(const recurrent_run *run, const sl_quantized_weight *weight, const float *x, float *out,
                              int8_t *bits, const float *bias, sl_arena *arena, sl_linear_dynamic_args *product_args,
                              sl_linear_run *product) {
  const sl_recurrent_dynamic_args *args = run->args;
  *product_args = (sl_linear_dynamic_args){0};
  product_args->rows = args->batch, product_args->weight = *weight, product_args->dtype = SL_F32;
  product_args->x = x, product_args->bias = bias, product_args->out = out, product_args->bits = bits;
  product_args->activation_bits = args->state_bits, product_args->target_sqnr = args->target_sqnr;
  product_args->per_token = true, product_args->executor = args->executor;
  SL_CHECK(sl_linear_prepare(product_args, SL_F32, arena, product));
  int64_t workers = sl_executor_workers(run->executor), panels = sl_group_panels(weight);
  product->column_chunks = workers > 1 ? workers * TASKS_OF_WORKER : 1;
  if (product->column_chunks > panels) product->column_chunks = panels;
  return SL_OK;
}

static sl_status prepare(const sl_recurrent_dynamic_args *args, int gates, sl_arena *arena, recurrent_run *run) {
  memset(run, 0, sizeof *run);
  run->args = args, run->lstm = gates == 4;
  run->gate_columns = gates * args->hidden_size, run->state_size = args->hidden.in_features;
  int64_t work = args->batch * run->gate_columns * (run->state_size + 1);
  run->executor = work < PARALLEL_WORK ? NULL : args->executor;
  int64_t tasks = sl_executor_workers(run->executor) * TASKS_OF_WORKER;
  run->row_tasks = args->batch < tasks ? args->batch : tasks;

  run->offsets = sl_arena_take(arena, args->steps, sizeof(int64_t));
  run->input_gates = sl_arena_take(arena, args->rows * run->gate_columns, sizeof(float));
  run->hidden_gates = sl_arena_take(arena, args->batch * run->gate_columns, sizeof(float));
  run->state = sl_arena_take(arena, args->batch * run->state_size, sizeof(float));
  run->cell = sl_arena_take(arena, run->lstm ? args->batch * args->hidden_size : 0, sizeof(float));
  run->unprojected = sl_arena_take(arena, args->project ? args->batch * args->hidden_size : 0, sizeof(float));
  run->state_bits = sl_arena_take(arena, args->batch, 1);
  run->unprojected_bits = sl_arena_take(arena, args->project ? args->batch : 0, 1);

  sl_linear_dynamic_args *input = &run->input_args;
  input->rows = args->rows, input->weight = args->input, input->dtype = args->dtype, input->x = args->x;
  input->bias = args->input_bias, input->out = run->input_gates, input->bits = args->bits;
  input->activation_bits = args->activation_bits, input->target_sqnr = args->target_sqnr, input->per_token = true;
  input->outlier_ratio = args->outlier_ratio, input->executor = args->executor;
  SL_CHECK(sl_linear_prepare(input, SL_F32, arena, &run->input));
  SL_CHECK(prepare_step(run, &args->hidden, run->state, run->hidden_gates, run->state_bits, args->hidden_bias, arena,
                        &run->hidden_args, &run->hidden));
  if (args->project) {
    SL_CHECK(prepare_step(run, &args->projection, run->unprojected, run->state, run->unprojected_bits, NULL, arena,
                          &run->projection_args, &run->projection));
  }
  SL_REQUIRE(!arena->overflow, SL_OUT_OF_RANGE,
             "rows is %lld with hidden_size %lld: the workspace would exceed the address space", (long long)args->rows,
             (long long)args->hidden_size);
  return SL_OK;
}

static sl_status measure_workspace(const sl_recurrent_dynamic_args *args, int gates, size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(sl_quantize_validate_recurrent(args, gates, false));
  sl_arena arena = sl_arena_make(NULL, 0);
  recurrent_run run;
  SL_CHECK(prepare(args, gates, &arena, &run));
  *bytes = arena.used;
  return SL_OK;
}

/* The step that a round runs, and how many sequences have a row in it. */
static int64_t step_of(const recurrent_run *run, int64_t round) {
  return run->args->reverse ? run->args->steps - 1 - round : round;
}
static int64_t rows_of(const recurrent_run *run, int64_t step) {
  return run->args->batch_sizes ? run->args->batch_sizes[step] : run->args->batch;
}

/* The rows of one of row_tasks tasks. */
typedef struct row_range {
  int64_t begin, end;
} row_range;
static row_range range_of(const recurrent_run *run, int64_t task, int64_t rows) {
  int64_t batch = run->args->batch;
  row_range range = {batch * task / run->row_tasks, batch * (task + 1) / run->row_tasks};
  if (range.end > rows) range.end = rows;
  return range;
}

static void load_values(const recurrent_run *run, const void *from, int64_t count, float *to) {
  if (count == 0) return;
  if (run->args->dtype == SL_F32) {
    memcpy(to, from, (size_t)count * sizeof(float));
  } else {
    run->hidden.kernel->load_row(run->args->dtype, from, count, to);
  }
}

static void store_values(const recurrent_run *run, const float *from, int64_t count, void *to, int64_t at) {
  if (count == 0) return;
  if (run->args->dtype == SL_F32) {
    memcpy((float *)to + at, from, (size_t)count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) sl_store_value(run->args->dtype, to, at + i, from[i]);
}

static void multiply_state_task(void *context, int64_t worker, int64_t task) {
  const recurrent_run *run = context;
  int64_t tasks = sl_linear_blocks(&run->hidden) * run->hidden.column_chunks;
  sl_linear_multiply(&run->hidden, worker, task % tasks, rows_of(run, step_of(run, task / tasks)));
}

/* The state of this step is in its place: gives it away and quantises it for the next one. */
static void finish_row(const recurrent_run *run, int64_t worker, int64_t step, int64_t row) {
  const sl_recurrent_dynamic_args *args = run->args;
  int64_t at = run->offsets[step] + row, size = run->state_size;
  store_values(run, run->state + row * size, size, args->out, at * size);
  args->bits[args->rows + at] = run->state_bits[row];
  sl_linear_quantize_row(&run->hidden, worker, row);
}

static void gates_task(void *context, int64_t worker, int64_t task) {
  const recurrent_run *run = context;
  const sl_recurrent_dynamic_args *args = run->args;
  int64_t step = step_of(run, task / run->row_tasks), size = args->hidden_size;
  row_range range = range_of(run, task % run->row_tasks, rows_of(run, step));
  for (int64_t row = range.begin; row < range.end; ++row) {
    const float *x = run->input_gates + (run->offsets[step] + row) * run->gate_columns;
    const float *h = run->hidden_gates + row * run->gate_columns;
    if (!run->lstm) {
      run->hidden.kernel->gru_gates(x, h, size, run->state + row * size);
    } else {
      float *out = (args->project ? run->unprojected : run->state) + row * size;
      run->hidden.kernel->lstm_gates(x, h, size, run->cell + row * size, out);
    }
    if (args->project) {
      sl_linear_quantize_row(&run->projection, worker, row);
      args->bits[2 * args->rows + run->offsets[step] + row] = run->unprojected_bits[row];
    } else {
      finish_row(run, worker, step, row);
    }
  }
}

static void project_task(void *context, int64_t worker, int64_t task) {
  const recurrent_run *run = context;
  int64_t tasks = sl_linear_blocks(&run->projection) * run->projection.column_chunks;
  sl_linear_multiply(&run->projection, worker, task % tasks, rows_of(run, step_of(run, task / tasks)));
}

static void finish_task(void *context, int64_t worker, int64_t task) {
  const recurrent_run *run = context;
  int64_t step = step_of(run, task / run->row_tasks);
  row_range range = range_of(run, task % run->row_tasks, rows_of(run, step));
  for (int64_t row = range.begin; row < range.end; ++row) finish_row(run, worker, step, row);
}

static void begin_task(void *context, int64_t worker, int64_t task) {
  const recurrent_run *run = context;
  row_range range = range_of(run, task, run->args->batch);
  for (int64_t row = range.begin; row < range.end; ++row) sl_linear_quantize_row(&run->hidden, worker, row);
}

static sl_status run_layer(const sl_recurrent_dynamic_args *args, int gates) {
  SL_CHECK(sl_quantize_validate_recurrent(args, gates, true));
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  recurrent_run run;
  SL_CHECK(prepare(args, gates, &arena, &run));
  SL_REQUIRE(arena.used == 0 || (args->workspace && arena.used <= args->workspace_size), SL_OUT_OF_MEMORY,
             "workspace_size is %zu, expected at least %zu", args->workspace ? args->workspace_size : 0, arena.used);
  int64_t states = args->batch * run.state_size, cells = run.lstm ? args->batch * args->hidden_size : 0, offset = 0;
  load_values(&run, args->h0, states, run.state);
  load_values(&run, args->c0, cells, run.cell);
  for (int64_t step = 0; step < args->steps; ++step) {
    run.offsets[step] = offset;
    offset += rows_of(&run, step);
  }
  sl_linear_run_all(&run.input);
  sl_run_tasks(run.executor, run.row_tasks, begin_task, &run);
  sl_stage stages[4];
  int count = 0;
  stages[count++] =
      (sl_stage){sl_linear_blocks(&run.hidden) * run.hidden.column_chunks, multiply_state_task, NULL, &run};
  stages[count++] = (sl_stage){run.row_tasks, gates_task, NULL, &run};
  if (args->project) {
    int64_t tasks = sl_linear_blocks(&run.projection) * run.projection.column_chunks;
    stages[count++] = (sl_stage){tasks, project_task, NULL, &run};
    stages[count++] = (sl_stage){run.row_tasks, finish_task, NULL, &run};
  }
  sl_run_rounds(run.executor, stages, count, args->steps);
  store_values(&run, run.state, states, args->hn, 0);
  store_values(&run, run.cell, cells, args->cn, 0);
  return SL_OK;
}

sl_status sl_lstm_dynamic_workspace_size(const sl_recurrent_dynamic_args *args, size_t *bytes) {
  return measure_workspace(args, 4, bytes);
}
sl_status sl_lstm_dynamic(const sl_recurrent_dynamic_args *args) { return run_layer(args, 4); }

sl_status sl_gru_dynamic_workspace_size(const sl_recurrent_dynamic_args *args, size_t *bytes) {
  return measure_workspace(args, 3, bytes);
}
sl_status sl_gru_dynamic(const sl_recurrent_dynamic_args *args) { return run_layer(args, 3); }

/* quantize_dynamic: rows in, integers and scales out. */
#include <stddef.h>
#include <string.h>

#include "quantize/rows.h"
#include "quantize/validate.h"
#include "runtime/executor.h"
#include "runtime/status.h"

typedef struct quantize_run {
  const sl_quantize_dynamic_args *args;
  sl_rows rows;
  int16_t *integers; /* [workers, columns]; for results in bytes */
} quantize_run;

static sl_status prepare(const sl_quantize_dynamic_args *args, sl_arena *arena, quantize_run *run) {
  memset(run, 0, sizeof *run);
  run->args = args;
  sl_rows *rows = &run->rows;
  rows->kernel = sl_quantize_find_kernel(), rows->executor = args->executor;
  rows->dtype = args->dtype, rows->x = args->x, rows->rows = args->rows, rows->columns = args->columns;
  rows->activation_bits = args->activation_bits, rows->target_sqnr = args->target_sqnr;
  rows->per_token = args->per_token;
  sl_take_rows_workspace(rows, arena);
  run->integers = sl_arena_take(arena, sl_executor_workers(args->executor) * args->columns, sizeof(int16_t));
  SL_REQUIRE(!arena->overflow, SL_OUT_OF_RANGE,
             "x has %lld x %lld elements: the workspace would exceed the address space", (long long)args->rows,
             (long long)args->columns);
  return SL_OK;
}

sl_status sl_quantize_dynamic_workspace_size(const sl_quantize_dynamic_args *args, size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(sl_quantize_validate_quantize(args, false));
  sl_arena arena = sl_arena_make(NULL, 0);
  quantize_run run;
  SL_CHECK(prepare(args, &arena, &run));
  *bytes = arena.used;
  return SL_OK;
}

static void quantize_task(void *context, int64_t worker, int64_t row) {
  const quantize_run *run = context;
  const sl_quantize_dynamic_args *args = run->args;
  bool bytes = args->activation_bits > 0 && args->activation_bits <= 8;
  int64_t at = row * args->columns;
  int16_t *q = bytes ? run->integers + worker * args->columns : (int16_t *)args->q + at;
  float scale;
  int bits = sl_quantize_row(&run->rows, worker, row, q, &scale, NULL);
  if (bytes) run->rows.kernel->narrow_row(q, args->columns, NULL, (int8_t *)args->q + at);
  if (args->per_token) args->scale[row] = scale, args->bits[row] = (int8_t)bits;
}

/* The scale and width of the tensor. With one scale for all, a row that isn't finite cannot have NaN for its scale. */
static void finish_tensor(quantize_run *run) {
  const sl_quantize_dynamic_args *args = run->args;
  const sl_rows *rows = &run->rows;
  float amax = sl_float_from_bits(rows->whole.amax_bits);
  bool empty = args->rows == 0 || args->columns == 0;
  int bits = empty ? sl_choose_bits(args->activation_bits, args->target_sqnr, 0, 0, 0) : rows->whole_bits;
  args->scale[0] = sl_forward_scale(amax, bits), args->bits[0] = (int8_t)bits;
  for (int64_t row = 0; row < args->rows && args->columns > 0; ++row) {
    if (!sl_measure_is_finite(&rows->measures[row])) args->scale[0] = NAN, args->bits[0] = 0;
  }
}

sl_status sl_quantize_dynamic(const sl_quantize_dynamic_args *args) {
  SL_CHECK(sl_quantize_validate_quantize(args, true));
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  quantize_run run;
  SL_CHECK(prepare(args, &arena, &run));
  SL_REQUIRE(arena.used == 0 || (args->workspace && arena.used <= args->workspace_size), SL_OUT_OF_MEMORY,
             "workspace_size is %zu, expected at least %zu", args->workspace ? args->workspace_size : 0, arena.used);
  sl_stage stages[SL_MEASURE_STAGES + 1];
  int count = sl_list_measure_stages(&run.rows, stages);
  stages[count++] = (sl_stage){args->rows, quantize_task, NULL, &run};
  sl_run_stages(sl_executor_for(args->executor, args->rows * args->columns), stages, count);
  if (!args->per_token) finish_tensor(&run);
  return SL_OK;
}

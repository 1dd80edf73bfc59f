/* The parts of linear_dynamic: what a recurrent layer runs step by step. Rows are quantised one by one, then blocks of
 * rows are multiplied by chunks of panels. */
#ifndef SL_QUANTIZE_LINEAR_H
#define SL_QUANTIZE_LINEAR_H

#include "quantize/rows.h"

typedef struct sl_linear_run {
  const sl_linear_dynamic_args *args;
  const sl_quantize_kernel *kernel;
  sl_dtype out_dtype;
  bool wide;         /* rows are int16_t or, of at most 7 bits, int8_t, in one plane; else int8_t, in one or two */
  int64_t row_bytes; /* of a row, both planes */
  int64_t segments, block_rows, column_chunks;
  int64_t task_rows; /* rows that a task quantises */
  sl_rows rows;
  /* Workspace. */
  char *activations; /* [rows, row_bytes] */
  float *scale;      /* [rows, 2]: of each plane, 0 for a plane that isn't there */
  int32_t *sums;     /* [rows, 2, segments], of int8_t rows */
  float *outliers;   /* [rows, most outliers] */
  int16_t *integers; /* [workers, padded inputs] */
  char *scratch;     /* [workers, scratch_bytes] */
  int64_t scratch_bytes;
} sl_linear_run;

/* Takes the workspace of a run from the arena; args were checked, and outlive the run. */
sl_status sl_linear_prepare(const sl_linear_dynamic_args *args, sl_dtype out_dtype, sl_arena *arena,
                            sl_linear_run *run);

/* All of it, on args->executor. */
void sl_linear_run_all(sl_linear_run *run);

/* Quantises one row of x; what sl_list_measure_stages() lists for run->rows was done. */
void sl_linear_quantize_row(const sl_linear_run *run, int64_t worker, int64_t row);

/* Multiplies a block of rows by a chunk of panels. There are sl_linear_blocks() * column_chunks tasks. Only the first
 * so many rows are there. */
void sl_linear_multiply(const sl_linear_run *run, int64_t worker, int64_t task, int64_t rows);

static inline int64_t sl_linear_blocks(const sl_linear_run *run) {
  return sl_ceil_divide(run->args->rows, run->block_rows);
}

#endif

/* Rows of activations: measured, their widths chosen, outlier channels found, quantised. */
#ifndef SL_QUANTIZE_ROWS_H
#define SL_QUANTIZE_ROWS_H

#include "quantize/rounding.h"
#include "runtime/arena.h"
#include "runtime/executor.h"

typedef struct sl_row_measure {
  uint32_t amax_bits; /* of float32; infinity's and above: the row isn't finite */
  double sumsq;
} sl_row_measure;

typedef struct sl_rows {
  const sl_quantize_kernel *kernel;
  const sl_executor *executor;
  sl_dtype dtype;
  const void *x;
  int64_t rows, columns;
  int32_t activation_bits;
  double target_sqnr;
  bool per_token;
  double outlier_ratio;

  /* Set by the measure stages. */
  int64_t finite;            /* rows */
  int64_t outliers;          /* how many channels are left out */
  int64_t *outlier_channels; /* which, ascending */
  sl_row_measure whole;      /* of all finite rows, without outlier channels */
  int whole_bits;            /* the width for the tensor, if not per_token */

  /* Workspace. */
  sl_row_measure *measures; /* [rows] */
  float *channel_amax;      /* [workers, columns] */
  float *values;            /* [workers, columns] */
} sl_rows;

/* At most so many outlier channels. */
static inline int64_t sl_most_outliers(int64_t columns) { return columns / 32 > 1 ? columns / 32 : 1; }

static inline bool sl_measure_is_finite(const sl_row_measure *measure) { return measure->amax_bits < 0x7f800000u; }

/* Takes the workspace from the arena; the fields above it are set. */
void sl_take_rows_workspace(sl_rows *rows, sl_arena *arena);

/* What has to be known about all rows before one can be quantised: writes the stages that find it, which come before
 * all calls of sl_quantize_row(), and returns how many. */
enum { SL_MEASURE_STAGES = 2 };
int sl_list_measure_stages(sl_rows *rows, sl_stage stages[SL_MEASURE_STAGES]);

/* Quantises a row to q [columns], with 0 at outlier channels; their values go to outlier_values [outliers]. Writes the
 * scale, NaN for a row that isn't finite, and returns the width, 0 for such a row. */
int sl_quantize_row(const sl_rows *rows, int64_t worker, int64_t row, int16_t *q, float *scale, float *outlier_values);

/* The executor for work on so many elements: serial where handing it out would take longer. */
static inline const sl_executor *sl_executor_for(const sl_executor *executor, int64_t elements) {
  return elements < 32768 ? NULL : executor;
}

#endif

/* The kernel table: what one instruction-set tier supplies for quantize. Control flow over rows, panels and segments is
 * plain C above it. */
#ifndef SL_QUANTIZE_KERNEL_H
#define SL_QUANTIZE_KERNEL_H

#include <sluice/quantize.h>

/* Rows that a tile has, at most. */
enum { SL_QUANTIZE_TILE_ROWS = 6 };

/* Inputs in a segment, at most: 512 products of a 16-bit activation and an 8-bit weight fit into 32 bits. */
enum { SL_QUANTIZE_SEGMENT = 512 };

/* One tile of a product: rows x SL_QUANTIZE_PANEL, over segments of equal depth that follow one another. The
 * activations of row r are at activations[r]: int16_t for multiply8 if the table has wide_activations, else int8_t.
 * depth is a multiple of SL_QUANTIZE_DEPTH. multiply8_unpacked gets one segment. */
typedef struct sl_quantize_tile {
  int rows; /* from 1 to what the table says */
  int64_t depth, segments;
  const void *const *activations;
  const uint8_t *weight;      /* the segments' blocks in the panel; or what unpack_segment made of them */
  const int32_t *const *sums; /* [rows][segments], sums of a row's activations; only for int8_t activations */
  const float *scale;         /* [SL_QUANTIZE_PANEL] of each segment, at a distance of scale_stride */
  int64_t scale_stride;
  float *out; /* [rows, SL_QUANTIZE_PANEL]: scale * (the exact integer sums, rounded to float) is added, in order */
} sl_quantize_tile;

/* Rows of the output, from tiles: out[i, c] = bias[c] + sum over planes p of row_scale[i, p] * tile[i, p, c]
 *                                            + sum over outliers j of outlier[i, j] * outlier_weight[j, c]. */
typedef struct sl_quantize_finish {
  int64_t rows;
  int planes;                  /* tiles of a row: 1, or 2 */
  const float *tile;           /* [rows, planes, SL_QUANTIZE_PANEL] */
  const int32_t *place;        /* [rows]: the row of tile; NULL: the same */
  const float *scale;          /* [rows, planes] */
  const float *bias;           /* [SL_QUANTIZE_PANEL] */
  int64_t outliers;            /* 0: none */
  const float *outlier;        /* [rows, outliers] */
  const float *outlier_weight; /* [outliers, SL_QUANTIZE_PANEL] */
  int channels;                /* how many of the panel exist: 1 to SL_QUANTIZE_PANEL */
  sl_dtype dtype;
  void *out;                          /* element of the first row and channel */
  int64_t row_stride, channel_stride; /* of out, in elements; one of them is 1 */
} sl_quantize_finish;

typedef struct sl_quantize_kernel {
  const char *name;
  sl_isa isa;
  bool wide_activations;
  /* Rows of a tile that suit each function, at most SL_QUANTIZE_TILE_ROWS. */
  int height8, height8_unpacked, height7, height4;

  /* out[i] = x[i] as float32; not called for SL_F32. */
  void (*load_row)(sl_dtype dtype, const void *x, int64_t count, float *out);
  /* Largest bits of |x|, so that NaN > infinity > all else; and the sum of squares, in double. */
  void (*measure_row)(const float *x, int64_t count, uint32_t *amax_bits, double *sumsq);
  /* channel_amax[i] = max(channel_amax[i], |x[i]|); x is finite. */
  void (*measure_channels)(const float *x, int64_t count, float *channel_amax);
  /* q[i] = clamp(round(x[i] * inverse), -qmax, qmax); x is finite. */
  void (*quantize_row)(const float *x, int64_t count, float inverse, int32_t qmax, int16_t *q);
  /* q as bytes: with high NULL, low = q, which fits; else 256 * high + low = q with low in [-128, 127]. */
  void (*narrow_row)(const int16_t *q, int64_t count, int8_t *high, int8_t *low);
  int32_t (*sum_row)(const int8_t *q, int64_t count);

  void (*multiply8)(const sl_quantize_tile *tile);
  void (*multiply4)(const sl_quantize_tile *tile);
  /* 8-bit weights and int8_t activations of at most 7 bits. NULL: nothing is gained over multiply8. */
  void (*multiply7)(const sl_quantize_tile *tile);
  /* For many rows: rewrites the blocks of a segment of 8-bit weights so that multiply8_unpacked is faster than
   * multiply8. out has 2 * depth * SL_QUANTIZE_PANEL bytes, 64-byte aligned. Both NULL: nothing is gained. */
  void (*unpack_segment)(const uint8_t *weight, int64_t depth, void *out);
  void (*multiply8_unpacked)(const sl_quantize_tile *tile);

  void (*finish)(const sl_quantize_finish *finish);

  /* A step of a recurrent layer, ops/sluice/quantize_recurrent.h: x and h, [gates, size], are its two products, biases
   * added. cell and state are those of the step before, and written. */
  void (*lstm_gates)(const float *x, const float *h, int64_t size, float *cell, float *out);
  void (*gru_gates)(const float *x, const float *h, int64_t size, float *state);
  int64_t (*run_peak)(int64_t count); /* sl_quantize_run_peak */
} sl_quantize_kernel;

/* The kernel number i of kernels.def, NULL behind the last. */
const sl_quantize_kernel *sl_quantize_list_kernels(int number);

/* The best kernel that sl_cpu_isa() allows. */
const sl_quantize_kernel *sl_quantize_find_kernel(void);

extern const sl_quantize_kernel sl_quantize_scalar;

#endif

/* conv2d_dynamic: each image is quantised once, into a padded buffer [height, width, channels]; then output pixels are
 * the rows of a product with the packed weight. A row is the window of its pixel: a stretch of the buffer where that
 * has no gaps (1 x 1 kernels, and kernels as wide as the padded image), else copied tap by tap, a block of pixels
 * at a time. */
#include <stddef.h>
#include <string.h>

#include "quantize/conv2d.h"
#include "quantize/panel.h"
#include "quantize/rows.h"
#include "quantize/validate.h"
#include "runtime/executor.h"
#include "runtime/status.h"

enum {
  MOST_BLOCK_ROWS = 96,
  BLOCK_BYTES = 256 << 10, /* copied windows of a block */
  CHUNK = 8192,            /* elements of an image that are measured in one task */
  TASKS = 16,              /* at least so many, so that workers of unequal speed end together */
};

typedef struct conv2d_run {
  const sl_conv2d_dynamic_args *args;
  const sl_quantize_kernel *kernel;
  bool wide;      /* integers are int16_t or, in an image of at most 7 bits, int8_t; else int8_t in one or two planes */
  size_t element; /* bytes of one, at most */
  bool direct;    /* windows have no gaps */
  int64_t padded_height, padded_width, out_width, pixels;
  int64_t image_elements, chunks, inputs, segments;
  int64_t block_rows, blocks, column_chunks, panels; /* of a group of channels */
  /* Workspace. */
  sl_row_measure *measures; /* [images, chunks] */
  float *scale;             /* [images] */
  float *inverse;           /* [images] */
  char *planes;             /* [images, 2 if not wide, plane_bytes] */
  int64_t plane_bytes;
  char *scratch; /* [workers, scratch_bytes] */
  int64_t scratch_bytes;
} conv2d_run;

typedef struct conv2d_scratch {
  float *values;            /* for load_row: [CHUNK or the longest line] */
  int16_t *integers;        /* a line of the image */
  char *windows;            /* [block rows, 2, inputs] */
  int32_t *sums;            /* [block rows, 2, segments], of int8_t rows */
  const void **activations; /* [block rows * 2] */
  const int32_t **sum_rows; /* [block rows * 2] */
  float *scale;             /* [block rows, 2] */
  float *tile;              /* [block rows * 2, SL_QUANTIZE_PANEL] */
  char *unpacked;
} conv2d_scratch;

static conv2d_scratch cut_scratch(const conv2d_run *run, sl_arena *arena) {
  int64_t line = run->args->channels_last ? run->args->width * run->args->channels : run->args->width;
  int64_t rows = 2 * run->block_rows;
  conv2d_scratch scratch;
  scratch.values = sl_arena_take(arena, line > CHUNK ? line : CHUNK, sizeof(float));
  scratch.integers = sl_arena_take(arena, line, sizeof(int16_t));
  /* Two planes of bytes, or one of two bytes: the same room. */
  scratch.windows = sl_arena_take(arena, run->direct ? 0 : rows, (size_t)run->inputs);
  scratch.sums = sl_arena_take(arena, rows * run->segments, sizeof(int32_t));
  scratch.activations = sl_arena_take(arena, rows, sizeof(void *));
  scratch.sum_rows = sl_arena_take(arena, rows, sizeof(int32_t *));
  scratch.scale = sl_arena_take(arena, rows, sizeof(float));
  scratch.tile = sl_arena_take(arena, rows * SL_QUANTIZE_PANEL, sizeof(float));
  scratch.unpacked = sl_arena_take(arena, SL_PANEL_SCRATCH, 1);
  return scratch;
}

static sl_status prepare(const sl_conv2d_dynamic_args *args, sl_arena *arena, conv2d_run *run) {
  memset(run, 0, sizeof *run);
  run->args = args;
  run->kernel = sl_quantize_find_kernel();
  run->wide = sl_rows_are_wide(run->kernel, args->weight.bits);
  run->element = run->wide ? 2 : 1;
  run->padded_height = args->height + 2 * args->padding[0], run->padded_width = args->width + 2 * args->padding[1];
  run->out_width = sl_conv2d_out_size(args, 1), run->pixels = sl_conv2d_out_size(args, 0) * run->out_width;
  run->image_elements = args->channels * args->height * args->width;
  run->chunks = sl_ceil_divide(run->image_elements, CHUNK);
  if (run->chunks == 0) run->chunks = 1; /* widths are chosen even so */
  run->inputs = sl_padded_inputs(&args->weight), run->segments = sl_count_segments(&args->weight);
  bool whole_lines = args->kernel[1] == run->padded_width && args->dilation[0] == 1;
  bool one_line = args->kernel[0] == 1 || whole_lines;
  run->direct = (args->kernel[0] == 1 && args->kernel[1] == 1) ||
                (args->weight.groups == 1 && one_line && (args->kernel[1] == 1 || args->dilation[1] == 1));
  run->block_rows = run->direct || run->inputs == 0 ? MOST_BLOCK_ROWS : BLOCK_BYTES / (2 * run->inputs);
  if (run->block_rows > MOST_BLOCK_ROWS) run->block_rows = MOST_BLOCK_ROWS;
  if (run->block_rows < SL_QUANTIZE_TILE_ROWS) run->block_rows = SL_QUANTIZE_TILE_ROWS;
  run->blocks = sl_ceil_divide(run->pixels, run->block_rows);
  run->block_rows = sl_ceil_divide(run->pixels, run->blocks);
  run->panels = sl_group_panels(&args->weight);
  int64_t tasks = args->images * args->weight.groups * run->blocks;
  run->column_chunks = tasks > 0 ? sl_ceil_divide(TASKS, tasks) : 1;
  if (run->column_chunks > run->panels) run->column_chunks = run->panels;

  run->measures = sl_arena_take(arena, args->images * run->chunks, sizeof(sl_row_measure));
  run->scale = sl_arena_take(arena, args->images, sizeof(float));
  run->inverse = sl_arena_take(arena, args->images, sizeof(float));
  /* The last window of a direct product may be read up to the padding of its inputs. */
  int64_t elements = run->padded_height * run->padded_width * args->channels + SL_QUANTIZE_DEPTH;
  run->plane_bytes = sl_round_up(elements * (int64_t)run->element, SL_ARENA_ALIGNMENT);
  run->planes = sl_arena_take(arena, args->images * (run->wide ? 1 : 2), (size_t)run->plane_bytes);
  sl_arena measured = sl_arena_make(NULL, 0);
  cut_scratch(run, &measured);
  run->scratch_bytes = (int64_t)measured.used;
  run->scratch = sl_arena_take(arena, sl_executor_workers(args->executor), measured.used);
  SL_REQUIRE(!arena->overflow && !measured.overflow, SL_OUT_OF_RANGE,
             "images is %lld of %lld x %lld x %lld: the workspace would exceed the address space",
             (long long)args->images, (long long)args->channels, (long long)args->height, (long long)args->width);
  return SL_OK;
}

sl_status sl_conv2d_dynamic_workspace_size(const sl_conv2d_dynamic_args *args, size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(sl_quantize_validate_conv2d(args, false));
  sl_arena arena = sl_arena_make(NULL, 0);
  conv2d_run run;
  SL_CHECK(prepare(args, &arena, &run));
  *bytes = arena.used;
  return SL_OK;
}

sl_status sl_conv2d_dynamic_out_size(const sl_conv2d_dynamic_args *args, int64_t out_size[2]) {
  SL_REQUIRE(out_size, SL_INVALID_ARGUMENT, "out_size is NULL");
  SL_CHECK(sl_quantize_validate_conv2d(args, false));
  out_size[0] = sl_conv2d_out_size(args, 0), out_size[1] = sl_conv2d_out_size(args, 1);
  return SL_OK;
}

static conv2d_scratch scratch_of(const conv2d_run *run, int64_t worker) {
  sl_arena arena = sl_arena_make(run->scratch + worker * run->scratch_bytes, (size_t)run->scratch_bytes);
  return cut_scratch(run, &arena);
}

/* Elements of x from index on, as float32. */
static const float *read_values(const conv2d_run *run, int64_t index, int64_t count, float *values) {
  const char *x = (const char *)run->args->x + index * (int64_t)sl_value_size(run->args->dtype);
  if (run->args->dtype == SL_F32) return (const float *)x;
  run->kernel->load_row(run->args->dtype, x, count, values);
  return values;
}

static void measure_task(void *context, int64_t worker, int64_t task) {
  const conv2d_run *run = context;
  int64_t begin = task % run->chunks * CHUNK, count = run->image_elements - begin;
  if (count > CHUNK) count = CHUNK;
  int64_t index = task / run->chunks * run->image_elements + begin;
  const float *values = read_values(run, index, count, scratch_of(run, worker).values);
  sl_row_measure *measure = &run->measures[task];
  run->kernel->measure_row(values, count, &measure->amax_bits, &measure->sumsq);
}

static void choose_widths(void *context) {
  const conv2d_run *run = context;
  const sl_conv2d_dynamic_args *args = run->args;
  for (int64_t image = 0; image < args->images; ++image) {
    sl_row_measure whole = {0, 0};
    for (int64_t chunk = 0; chunk < run->chunks; ++chunk) {
      const sl_row_measure *measure = &run->measures[image * run->chunks + chunk];
      if (measure->amax_bits > whole.amax_bits) whole.amax_bits = measure->amax_bits;
      whole.sumsq += measure->sumsq;
    }
    float amax = sl_float_from_bits(whole.amax_bits);
    bool finite = sl_measure_is_finite(&whole);
    int bits = sl_choose_bits(args->activation_bits, args->target_sqnr, amax, whole.sumsq, run->image_elements);
    args->bits[image] = (int8_t)(finite ? bits : 0);
    run->scale[image] = finite ? sl_forward_scale(amax, bits) : NAN;
    run->inverse[image] = finite ? sl_inverse_scale(amax, bits) : 0;
  }
}

static char *plane_of(const conv2d_run *run, int64_t image, int plane) {
  return run->planes + (image * (run->wide ? 1 : 2) + plane) * run->plane_bytes;
}

static bool image_is_wide(const conv2d_run *run, int64_t image) {
  return sl_row_is_wide(run->kernel, run->args->weight.bits, run->args->bits[image]);
}
static int64_t element_of(const conv2d_run *run, int64_t image) { return image_is_wide(run, image) ? 2 : 1; }

/* Integers of consecutive elements of the buffer (step 1), or of one channel of a line (step channels). */
static void store_integers(const conv2d_run *run, int64_t image, int64_t at, int64_t step, const int16_t *q,
                           int64_t count) {
  if (image_is_wide(run, image)) {
    int16_t *to = (int16_t *)plane_of(run, image, 0) + at;
    for (int64_t i = 0; i < count; ++i) to[i * step] = q[i];
    return;
  }
  int8_t *low = (int8_t *)plane_of(run, image, 0) + at;
  for (int64_t i = 0; i < count; ++i) low[i * step] = (int8_t)(uint8_t)(q[i] & 0xff);
  if (run->args->bits[image] != 16) return;
  int8_t *high = (int8_t *)plane_of(run, image, 1) + at;
  for (int64_t i = 0; i < count; ++i) high[i * step] = (int8_t)((q[i] + 128) >> 8);
}

static void quantize_line(const conv2d_run *run, const conv2d_scratch *scratch, int64_t image, int64_t index,
                          int64_t count, int64_t at, int64_t step) {
  int8_t bits = run->args->bits[image];
  if (bits == 0) { /* not finite: whatever is multiplied becomes NaN by the scale */
    memset(scratch->integers, 0, (size_t)count * sizeof(int16_t));
  } else {
    const float *values = read_values(run, index, count, scratch->values);
    run->kernel->quantize_row(values, count, run->inverse[image], sl_largest_integer(bits), scratch->integers);
  }
  store_integers(run, image, at, step, scratch->integers, count);
}

/* One line of the padded image. */
static void quantize_task(void *context, int64_t worker, int64_t task) {
  const conv2d_run *run = context;
  const sl_conv2d_dynamic_args *args = run->args;
  int64_t image = task / run->padded_height, line = task % run->padded_height, y = line - args->padding[0];
  int64_t channels = args->channels, row_elements = run->padded_width * channels;
  conv2d_scratch scratch = scratch_of(run, worker);
  bool last = line + 1 == run->padded_height;
  for (int plane = 0; plane < (run->wide ? 1 : 2); ++plane) {
    int64_t elements = row_elements + (last ? SL_QUANTIZE_DEPTH : 0), element = element_of(run, image);
    memset(plane_of(run, image, plane) + line * row_elements * element, 0, (size_t)(elements * element));
  }
  if (y < 0 || y >= args->height) return;
  int64_t first = image * run->image_elements, at = line * row_elements + args->padding[1] * channels;
  if (args->channels_last) {
    int64_t count = args->width * channels;
    quantize_line(run, &scratch, image, first + y * count, count, at, 1);
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    int64_t index = first + (c * args->height + y) * args->width;
    quantize_line(run, &scratch, image, index, args->width, at + c, channels);
  }
}

/* Copies the window whose first element is at from to a row of inputs. */
static void copy_window(const conv2d_run *run, size_t element, const char *from, char *to) {
  const sl_conv2d_dynamic_args *args = run->args;
  int64_t channels = args->channels / args->weight.groups;
  bool lines = args->weight.groups == 1 && args->dilation[1] == 1;
  size_t stretch = (size_t)(lines ? args->kernel[1] * channels : channels) * element;
  int64_t stretches = lines ? 1 : args->kernel[1];
  int64_t next = args->dilation[1] * args->channels * (int64_t)element;
  int64_t next_line = args->dilation[0] * run->padded_width * args->channels * (int64_t)element;
  for (int64_t y = 0; y < args->kernel[0]; ++y) {
    for (int64_t i = 0; i < stretches; ++i, to += stretch) memcpy(to, from + y * next_line + i * next, stretch);
  }
  memset(to, 0, (size_t)(run->inputs - args->weight.in_features) * element);
}

/* The windows of a block of pixels as rows for sl_multiply_panel(). */
static void list_windows(const conv2d_run *run, const conv2d_scratch *scratch, int64_t image, int64_t group,
                         int64_t first, int64_t rows, int planes) {
  const sl_conv2d_dynamic_args *args = run->args;
  int64_t element = element_of(run, image);
  for (int64_t i = 0; i < rows; ++i) {
    int64_t y = (first + i) / run->out_width, x = (first + i) % run->out_width;
    int64_t pixel = y * args->stride[0] * run->padded_width + x * args->stride[1];
    int64_t at = pixel * args->channels + group * (args->channels / args->weight.groups);
    for (int plane = 0; plane < planes; ++plane) {
      int64_t row = i * planes + plane;
      const char *window = plane_of(run, image, plane) + at * element;
      if (!run->direct) {
        char *copy = scratch->windows + row * run->inputs * element;
        copy_window(run, (size_t)element, window, copy);
        window = copy;
      }
      scratch->activations[row] = window;
      scratch->scale[row] = plane ? 256 * run->scale[image] : run->scale[image];
      if (element == 2) continue;
      int32_t *sums = scratch->sums + row * run->segments;
      sl_sum_segments(run->kernel, &args->weight, (const int8_t *)window, sums);
      scratch->sum_rows[row] = sums;
    }
  }
}

static void multiply_task(void *context, int64_t worker, int64_t task) {
  const conv2d_run *run = context;
  const sl_conv2d_dynamic_args *args = run->args;
  const sl_quantized_weight *weight = &args->weight;
  int64_t chunk = task % run->column_chunks, block = task / run->column_chunks % run->blocks;
  int64_t group = task / (run->column_chunks * run->blocks) % weight->groups;
  int64_t image = task / (run->column_chunks * run->blocks * weight->groups);
  int64_t first = block * run->block_rows, rows = run->pixels - first, outputs = sl_group_outputs(weight);
  if (rows > run->block_rows) rows = run->block_rows;
  conv2d_scratch scratch = scratch_of(run, worker);
  int planes = !run->wide && args->bits[image] == 16 ? 2 : 1;
  list_windows(run, &scratch, image, group, first, rows, planes);

  sl_panel_product product = {0};
  product.kernel = run->kernel, product.weight = weight, product.rows = rows * planes;
  product.activations = scratch.activations, product.sums = scratch.sum_rows;
  product.wide = image_is_wide(run, image);
  product.unpacked = scratch.unpacked, product.tile = scratch.tile;
  sl_quantize_finish finish = {0};
  finish.rows = rows, finish.planes = planes, finish.tile = scratch.tile, finish.scale = scratch.scale;
  finish.dtype = args->dtype;
  finish.row_stride = args->channels_last ? weight->out_features : 1;
  finish.channel_stride = args->channels_last ? 1 : run->pixels;
  int64_t end = run->panels * (chunk + 1) / run->column_chunks;
  for (int64_t panel = run->panels * chunk / run->column_chunks; panel < end; ++panel) {
    int64_t left = outputs - panel * SL_QUANTIZE_PANEL, channel = group * outputs + panel * SL_QUANTIZE_PANEL;
    float bias[SL_QUANTIZE_PANEL];
    sl_set_panel_channels(&finish, left, args->bias ? args->bias + channel : NULL, bias);
    int64_t at =
        image * weight->out_features * run->pixels + channel * finish.channel_stride + first * finish.row_stride;
    finish.out = (char *)args->out + at * (int64_t)sl_value_size(args->dtype);
    sl_multiply_panel(&product, group * run->panels + panel);
    run->kernel->finish(&finish);
  }
}

sl_status sl_conv2d_dynamic(const sl_conv2d_dynamic_args *args) {
  SL_CHECK(sl_quantize_validate_conv2d(args, true));
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  conv2d_run run;
  SL_CHECK(prepare(args, &arena, &run));
  SL_REQUIRE(args->workspace && arena.used <= args->workspace_size, SL_OUT_OF_MEMORY,
             "workspace_size is %zu, expected at least %zu", args->workspace ? args->workspace_size : 0, arena.used);
  if (args->images == 0) return SL_OK;
  int64_t tasks = args->images * args->weight.groups * run.blocks * run.column_chunks;
  const sl_stage stages[] = {
      {args->images * run.chunks, measure_task, choose_widths, &run},
      {args->images * run.padded_height, quantize_task, NULL, &run},
      {tasks, multiply_task, NULL, &run},
  };
  int64_t work = args->images * run.pixels * (run.inputs / 8 + 1) * (args->weight.out_features / 4 + 1);
  sl_run_stages(sl_executor_for(args->executor, work), stages, 3);
  return SL_OK;
}

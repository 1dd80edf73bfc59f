/* Sums of nanoseconds per part, and a micro-op table that adds to them. */
#include "attention/profile.h"

#include <time.h>

int64_t sl_profile_is_on = 0;

static int64_t nanoseconds[SL_PROFILE_PARTS], score_pairs, value_pairs;
static const sl_attention_kernel *original;
static sl_attention_kernel timed;

int64_t sl_profile_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void sl_profile_note(sl_profile_part part, int64_t begun) {
  __atomic_fetch_add(nanoseconds + part, sl_profile_now() - begun, __ATOMIC_RELAXED);
}

/* A group of rows is worked on as wide as its first row. */
static void count_pairs(int64_t *pairs, int64_t rows, const int32_t *lengths, int64_t step) {
  int64_t computed = 0;
  for (int64_t r = 0; r < rows; r += original->row_tile) computed += original->row_tile * sl_round_up(lengths[r], step);
  __atomic_fetch_add(pairs, computed, __ATOMIC_RELAXED);
}

static void multiply_nt(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                        const void *columns, int64_t depth, float *scores, int64_t score_stride) {
  int64_t begun = sl_profile_now();
  original->multiply_nt(rows, lengths, left, left_stride, columns, depth, scores, score_stride);
  sl_profile_note(SL_PROFILE_SCORES, begun);
  count_pairs(&score_pairs, rows, lengths, original->panel / 2); /* tables end a group at half a panel */
}

static void multiply_nn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *depths,
                        int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  int64_t begun = sl_profile_now();
  original->multiply_nn(rows, lengths, left, left_stride, depths, capacity, width, out, out_stride);
  sl_profile_note(SL_PROFILE_VALUES, begun);
  count_pairs(&value_pairs, rows, lengths, original->depth_step);
}

static void mask_tile(int64_t rows, const int32_t *lengths, float *scores, int64_t score_stride,
                      const int32_t *positions, const int32_t *lowest, const int32_t *highest) {
  int64_t begun = sl_profile_now();
  original->mask_tile(rows, lengths, scores, score_stride, positions, lowest, highest);
  sl_profile_note(SL_PROFILE_SOFTMAX, begun);
}

static void softmax_tile(const sl_softmax_tile *tile) {
  int64_t begun = sl_profile_now();
  original->softmax_tile(tile);
  sl_profile_note(SL_PROFILE_SOFTMAX, begun);
}

const sl_attention_kernel *sl_profile_kernel(const sl_attention_kernel *kernel) {
  if (!sl_profile_is_on) return kernel;
  original = kernel;
  timed = *kernel;
  timed.multiply_nt = multiply_nt;
  timed.multiply_nn = multiply_nn;
  timed.mask_tile = mask_tile;
  timed.softmax_tile = softmax_tile;
  return &timed;
}

void sl_attention_profile_begin(void) {
  for (int part = 0; part < SL_PROFILE_PARTS; ++part) nanoseconds[part] = 0;
  score_pairs = value_pairs = 0;
  sl_profile_is_on = 1;
}

void sl_attention_profile_end(sl_attention_profile *profile) {
  sl_profile_is_on = 0;
  double seconds[SL_PROFILE_PARTS];
  for (int part = 0; part < SL_PROFILE_PARTS; ++part) seconds[part] = (double)nanoseconds[part] * 1e-9;
  *profile = (sl_attention_profile){.busy = seconds[SL_PROFILE_BUSY],
                                    .sort = seconds[SL_PROFILE_SORT],
                                    .pack = seconds[SL_PROFILE_PACK],
                                    .rows = seconds[SL_PROFILE_ROWS],
                                    .scores = seconds[SL_PROFILE_SCORES],
                                    .softmax = seconds[SL_PROFILE_SOFTMAX],
                                    .values = seconds[SL_PROFILE_VALUES],
                                    .score_pairs = score_pairs,
                                    .value_pairs = value_pairs};
}

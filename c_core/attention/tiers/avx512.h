/* The parts of the AVX-512 overlays. Both work on 12 x 32 register tiles in 24 of the 32 registers, in which a step of
 * the depth is one 32-bit word: a float, or on avx512bf16 a pair of bfloat16. */
#ifndef SL_ATTENTION_AVX512_H
#define SL_ATTENTION_AVX512_H

#include "attention/kernel.h"

enum { SL_AVX512_ROWS = 12, SL_AVX512_PANEL = 32 };

/* Elements are float. */
void sl_avx512_multiply_nt(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                           const void *columns, int64_t depth, float *scores, int64_t score_stride);
void sl_avx512_multiply_nn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                           const void *depths, int64_t capacity, int64_t width, float *out, int64_t out_stride);
void sl_avx512_multiply_tn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                           const void *depths, int64_t capacity, int64_t width, float *out, int64_t out_stride);
void sl_avx512_softmax_tile(const sl_softmax_tile *tile);
void sl_avx512_softmax_gradient_tile(const sl_softmax_gradient_tile *tile);

/* Whatever the elements are. */
void sl_avx512_mask_tile(int64_t rows, const int32_t *lengths, float *scores, int64_t score_stride,
                         const int32_t *positions, const int32_t *lowest, const int32_t *highest);
void sl_avx512_bend_tile(const sl_bend_tile *tile);

/* Float operands and token rows of a dtype: not a matter of elements either. */
void sl_avx512_store_rows_bf16(void *target, int64_t token_stride, int64_t channels, const int32_t *index,
                               int64_t count, const float *out, int64_t out_stride, const float *factors);
void sl_avx512_dot_rows_f32(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list,
                            float *scores, int64_t score_stride);
void sl_avx512_add_rows_f32(float *out, int64_t out_stride, int64_t row_count, const float *weights,
                            int64_t weight_stride, const sl_row_list *list);
void sl_avx512_dot_rows_bf16(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list,
                             float *scores, int64_t score_stride);
void sl_avx512_add_rows_bf16(float *out, int64_t out_stride, int64_t row_count, const float *weights,
                             int64_t weight_stride, const sl_row_list *list);
void sl_avx512_dot_rows_f16(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list,
                            float *scores, int64_t score_stride);
void sl_avx512_add_rows_f16(float *out, int64_t out_stride, int64_t row_count, const float *weights,
                            int64_t weight_stride, const sl_row_list *list);
void sl_avx512_weigh_row(sl_weigh_row *row);

#endif

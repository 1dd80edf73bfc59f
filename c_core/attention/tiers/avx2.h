/* The parts of the AVX2 overlay, shared by its three tables: 6 x 16 register tiles, elements are float. */
#ifndef SL_ATTENTION_AVX2_H
#define SL_ATTENTION_AVX2_H

#include "attention/kernel.h"

enum { SL_AVX2_ROWS = 6, SL_AVX2_PANEL = 16 };

void sl_avx2_multiply_nt(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                         const void *columns, int64_t depth, float *scores, int64_t score_stride);
void sl_avx2_multiply_nn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                         const void *depths, int64_t capacity, int64_t width, float *out, int64_t out_stride);
void sl_avx2_mask_tile(int64_t rows, const int32_t *lengths, float *scores, int64_t score_stride,
                       const int32_t *positions, const int32_t *lowest, const int32_t *highest);
void sl_avx2_softmax_tile(const sl_softmax_tile *tile);
void sl_avx2_bend_tile(const sl_bend_tile *tile);
void sl_avx2_multiply_tn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                         const void *depths, int64_t capacity, int64_t width, float *out, int64_t out_stride);
void sl_avx2_softmax_gradient_tile(const sl_softmax_gradient_tile *tile);

void sl_avx2_dot_rows_f32(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list,
                          float *scores, int64_t score_stride);
void sl_avx2_add_rows_f32(float *out, int64_t out_stride, int64_t row_count, const float *weights,
                          int64_t weight_stride, const sl_row_list *list);
void sl_avx2_dot_rows_bf16(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list,
                           float *scores, int64_t score_stride);
void sl_avx2_add_rows_bf16(float *out, int64_t out_stride, int64_t row_count, const float *weights,
                           int64_t weight_stride, const sl_row_list *list);
void sl_avx2_dot_rows_f16(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list,
                          float *scores, int64_t score_stride);
void sl_avx2_add_rows_f16(float *out, int64_t out_stride, int64_t row_count, const float *weights,
                          int64_t weight_stride, const sl_row_list *list);
void sl_avx2_weigh_row(sl_weigh_row *row);

#endif

/* AVX2 overlay: what only the backward needs, the transposed product and the gradient of softmax and gate. */
#include <math.h>

#include "attention/tiers/avx2.h"
#include "attention/tiers/avx2_math.h"

enum { ROWS = SL_AVX2_ROWS, PANEL = SL_AVX2_PANEL };

/* out (count <= KEYS rows of 16 channels) += left^T . right over depth rows: the register tile of the forward's
 * products, with keys as its rows. The keys of one row of left are neighbours, so nothing needs to be transposed. */
#define MULTIPLY_TN(KEYS, count, left, left_stride, right, depth, out, out_stride)                   \
  do {                                                                                               \
    const float *a_ = (left), *b_ = (right);                                                         \
    __m256 sum_[KEYS][2];                                                                            \
    _Pragma("GCC unroll 6") for (int i = 0; i < KEYS; ++i) {                                         \
      sum_[i][0] = i < (count) ? _mm256_load_ps((out) + i * (out_stride)) : _mm256_setzero_ps();     \
      sum_[i][1] = i < (count) ? _mm256_load_ps((out) + i * (out_stride) + 8) : _mm256_setzero_ps(); \
    }                                                                                                \
    for (int64_t d_ = 0; d_ < (depth); ++d_, a_ += (left_stride), b_ += PANEL) {                     \
      __m256 b0_ = _mm256_load_ps(b_), b1_ = _mm256_load_ps(b_ + 8);                                 \
      _Pragma("GCC unroll 6") for (int i = 0; i < KEYS; ++i) {                                       \
        __m256 x_ = _mm256_broadcast_ss(a_ + i);                                                     \
        sum_[i][0] = _mm256_fmadd_ps(x_, b0_, sum_[i][0]);                                           \
        sum_[i][1] = _mm256_fmadd_ps(x_, b1_, sum_[i][1]);                                           \
      }                                                                                              \
    }                                                                                                \
    _Pragma("GCC unroll 6") for (int i = 0; i < KEYS; ++i) {                                         \
      if (i >= (count)) break;                                                                       \
      _mm256_store_ps((out) + i * (out_stride), sum_[i][0]);                                         \
      _mm256_store_ps((out) + i * (out_stride) + 8, sum_[i][1]);                                     \
    }                                                                                                \
  } while (0)

/* A panel of 16 keys is cut into 6 + 6 + 4, so that no group of keys reaches into the next panel, where left is not
 * known to be 0 for the rows that end in this one. */
void sl_avx2_multiply_tn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride,
                         const void *depths, int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  if (rows <= 0) return;
  int64_t keys = lengths[0];
  for (int64_t column = 0; column < width; column += PANEL) {
    const float *right = (const float *)depths + column * capacity;
    int64_t depth = rows;
    for (int64_t panel = 0; panel < keys; panel += PANEL) {
      for (int64_t key = panel; key < panel + PANEL && key < keys; key += 6) {
        while (lengths[depth - 1] <= key) --depth;
        const float *a = (const float *)left + key;
        float *target = out + key * out_stride + column;
        int64_t count = keys - key;
        if (key < panel + 12) {
          MULTIPLY_TN(6, count, a, left_stride, right, depth, target, out_stride);
        } else {
          MULTIPLY_TN(4, count, a, left_stride, right, depth, target, out_stride);
        }
      }
    }
  }
}

static inline void fill_with_zeros(float *weights, float *score_gradient, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += 8) {
    _mm256_store_ps(weights + j, _mm256_setzero_ps());
    _mm256_store_ps(score_gradient + j, _mm256_setzero_ps());
  }
}

/* What stays the same along a row. */
typedef struct row_constants {
  __m256 scale, lse, mean, exp_minus_a;
} row_constants;

/* Eight keys of a row; returns dz. Lanes outside of the mask are zeroed by it, not by a product, so that whatever
 * stands in the scores there does no harm. The gate's 1 - g is odds * g. */
static inline __m256 gated_gradient(row_constants row, __m256 score, __m256 e, const float *exp_minus_b, __m256 mask,
                                    float *weights, float *score_gradient) {
  __m256 p = _mm256_and_ps(mask, sl_avx2_exp2(_mm256_fmsub_ps(score, row.scale, row.lse)));
  __m256 odds = _mm256_mul_ps(row.exp_minus_a, _mm256_load_ps(exp_minus_b));
  __m256 gate = sl_avx2_reciprocal(_mm256_add_ps(odds, _mm256_set1_ps(1.0f)));
  __m256 weight = _mm256_mul_ps(p, gate), product = _mm256_mul_ps(weight, e);
  _mm256_store_ps(weights, weight);
  _mm256_store_ps(score_gradient, _mm256_and_ps(mask, _mm256_fnmadd_ps(p, row.mean, product)));
  return _mm256_and_ps(mask, _mm256_mul_ps(product, _mm256_mul_ps(odds, gate)));
}

static inline void open_gradient(row_constants row, __m256 score, __m256 e, __m256 mask, float *weights,
                                 float *score_gradient) {
  __m256 p = _mm256_and_ps(mask, sl_avx2_exp2(_mm256_fmsub_ps(score, row.scale, row.lse)));
  _mm256_store_ps(weights, p);
  _mm256_store_ps(score_gradient, _mm256_and_ps(mask, _mm256_mul_ps(p, _mm256_sub_ps(e, row.mean))));
}

static inline void row_gradient(const sl_softmax_gradient_tile *tile, int64_t r, float *weights,
                                float *score_gradient) {
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  const float *scores = tile->scores + r * tile->score_stride;
  const float *dout_values = tile->dout_values + r * tile->score_stride;
  int64_t length = tile->lengths[r], whole = length & ~INT64_C(7);
  __m256 tail = _mm256_castsi256_ps(sl_avx2_first_lanes(length - whole)), da = _mm256_setzero_ps();
  row_constants row = {_mm256_set1_ps(tile->scale_log2e), _mm256_broadcast_ss(tile->lse_log2 + r),
                       _mm256_broadcast_ss(tile->mean + r), _mm256_setzero_ps()};
  if (!tile->exp_minus_a) {
    for (int64_t j = 0; j < length; j += 8) {
      open_gradient(row, _mm256_load_ps(scores + j), _mm256_load_ps(dout_values + j), j < whole ? all : tail,
                    weights + j, score_gradient + j);
    }
    return;
  }
  row.exp_minus_a = _mm256_broadcast_ss(tile->exp_minus_a + r);
  for (int64_t j = 0; j < length; j += 8) {
    __m256 dz = gated_gradient(row, _mm256_load_ps(scores + j), _mm256_load_ps(dout_values + j), tile->exp_minus_b + j,
                               j < whole ? all : tail, weights + j, score_gradient + j);
    da = _mm256_add_ps(da, dz);
    _mm256_storeu_ps(tile->db + j, _mm256_add_ps(_mm256_loadu_ps(tile->db + j), dz));
  }
  tile->da[r] += sl_avx2_add_lanes(da);
}

void sl_avx2_softmax_gradient_tile(const sl_softmax_gradient_tile *tile) {
  for (int64_t first = 0; first < tile->rows && tile->lengths[first] > 0; first += ROWS) {
    int64_t width = sl_round_up(tile->lengths[first], PANEL);
    for (int64_t r = first; r < first + ROWS; ++r) {
      float *weights = (float *)tile->weights + r * tile->weight_stride;
      float *score_gradient = (float *)tile->score_gradient + r * tile->weight_stride;
      int64_t length = tile->lengths[r];
      if (length > 0 && tile->lse_log2[r] == -INFINITY) length = 0;
      if (length > 0) row_gradient(tile, r, weights, score_gradient);
      fill_with_zeros(weights, score_gradient, sl_round_up(length, 8), width);
    }
  }
}

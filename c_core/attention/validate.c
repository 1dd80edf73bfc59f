/* Checks of sl_gated_attention_args: every message names the argument, its value and what was expected. */
#include "attention/validate.h"

#include <math.h>
#include <stdint.h>

#include "runtime/status.h"

/* Token counts and the products of sizes stay below this, so that no index computation can overflow. */
static const int64_t largest_count = INT64_C(1) << 31;
/* Smaller caps would be no normal numbers in float32. */
static const double smallest_softcap = 1e-30;
static const int64_t largest_product = INT64_C(1) << 46;

static sl_status check_count(const char *name, int64_t value, int64_t least, int64_t most) {
  SL_REQUIRE(value >= least, SL_INVALID_ARGUMENT, "%s is %lld, expected at least %lld", name, (long long)value,
             (long long)least);
  SL_REQUIRE(value <= most, SL_OUT_OF_RANGE, "%s is %lld, expected at most %lld", name, (long long)value,
             (long long)most);
  return SL_OK;
}

static sl_status check_dtype(sl_dtype dtype) {
  static const char expected[] = "float32, bfloat16, float16 or float64";
  SL_REQUIRE(sl_dtype_size(dtype), SL_UNSUPPORTED, "dtype is %d, expected %s", (int)dtype, expected);
  SL_REQUIRE(dtype == SL_F32 || dtype == SL_BF16 || dtype == SL_F16 || dtype == SL_F64, SL_UNSUPPORTED,
             "dtype is %s, expected %s", sl_dtype_name(dtype), expected);
  return SL_OK;
}

/* Sizes of a paged cache. */
static sl_status check_pages(const sl_gated_attention_args *args) {
  SL_CHECK(check_count("block_size", args->block_size, 1, largest_count));
  SL_CHECK(check_count("blocks", args->blocks, 0, largest_count));
  SL_CHECK(check_count("max_blocks", args->max_blocks, 0, largest_count));
  int64_t product;
  bool overflow = __builtin_mul_overflow(args->blocks, args->block_size, &product) ||
                  __builtin_mul_overflow(product, args->heads_kv, &product) || product > largest_product;
  SL_REQUIRE(!overflow, SL_OUT_OF_RANGE,
             "blocks * block_size * heads_kv is %lld * %lld * %lld, expected a product of at most 2^46",
             (long long)args->blocks, (long long)args->block_size, (long long)args->heads_kv);
  return SL_OK;
}

static sl_status check_sizes(const sl_gated_attention_args *args) {
  SL_CHECK(check_dtype(args->dtype));
  SL_CHECK(check_count("batch", args->batch, 0, largest_count));
  SL_CHECK(check_count("heads_q", args->heads_q, 1, largest_count));
  SL_CHECK(check_count("heads_kv", args->heads_kv, 1, largest_count));
  SL_CHECK(check_count("n_q", args->n_q, 0, largest_count - 1));
  SL_CHECK(check_count("n_k", args->n_k, 0, largest_count - 1));
  SL_CHECK(check_count("head_dim", args->head_dim, 1, SL_ATTENTION_MAX_HEAD_DIM));
  SL_CHECK(check_count("head_dim_v", args->head_dim_v, 1, SL_ATTENTION_MAX_HEAD_DIM));
  SL_CHECK(check_count("window", args->window, 0, INT64_MAX));
  SL_CHECK(check_count("sinks", args->sinks, 0, INT64_MAX));
  SL_CHECK(check_count("sliding_window", args->sliding_window, 0, INT64_MAX));
  SL_REQUIRE(args->heads_q % args->heads_kv == 0, SL_INVALID_ARGUMENT,
             "heads_q is %lld, expected a multiple of heads_kv, which is %lld", (long long)args->heads_q,
             (long long)args->heads_kv);
  if (args->block_table) SL_CHECK(check_pages(args));
  int64_t tokens = args->n_q > args->n_k ? args->n_q : args->n_k;
  int64_t product;
  bool overflow = __builtin_mul_overflow(args->batch, args->heads_q, &product) ||
                  __builtin_mul_overflow(product, tokens, &product) || product > largest_product;
  SL_REQUIRE(!overflow, SL_OUT_OF_RANGE,
             "batch * heads_q * tokens is %lld * %lld * %lld, expected a product of at most 2^46",
             (long long)args->batch, (long long)args->heads_q, (long long)tokens);
  SL_REQUIRE(args->dropout_p >= 0 && args->dropout_p < 1, SL_INVALID_ARGUMENT,
             "dropout_p is %g, expected a number in [0, 1)", args->dropout_p);
  SL_REQUIRE(
      !args->output_gate.data || args->output_gate_channels == 1 || args->output_gate_channels == args->head_dim_v,
      SL_INVALID_ARGUMENT, "output_gate_channels is %lld, expected 1 or head_dim_v = %lld",
      (long long)args->output_gate_channels, (long long)args->head_dim_v);
  SL_REQUIRE(!args->dattn_mask.data || args->n_q <= largest_product / (args->n_k + 1), SL_OUT_OF_RANGE,
             "n_q * n_k is %lld * %lld, expected a product of at most 2^46 where attn_mask has a gradient",
             (long long)args->n_q, (long long)args->n_k);
  SL_REQUIRE(isfinite(args->scale), SL_INVALID_ARGUMENT, "scale is %g, expected a finite number", args->scale);
  SL_REQUIRE(isfinite(args->softcap) && (args->softcap == 0 || args->softcap >= smallest_softcap), SL_INVALID_ARGUMENT,
             "softcap is %g, expected a finite number of at least 0; 0, or at least %g", args->softcap,
             smallest_softcap);
  SL_REQUIRE(!args->executor || (args->executor->parallel_for && args->executor->threads >= 1), SL_INVALID_ARGUMENT,
             "executor has threads = %d, expected at least 1 and a parallel_for", (int)args->executor->threads);
  return SL_OK;
}

static sl_status check_pointer(const char *name, const void *data, int64_t elements) {
  SL_REQUIRE(data || elements == 0, SL_INVALID_ARGUMENT, "%s.data is NULL, expected %lld elements", name,
             (long long)elements);
  return SL_OK;
}

static bool is_number(sl_dtype dtype) {
  return dtype == SL_F32 || dtype == SL_BF16 || dtype == SL_F16 || dtype == SL_F64;
}

static sl_status check_masks(const sl_gated_attention_args *args, sl_attention_tensors tensors) {
  const sl_attention_mask *mask = &args->attn_mask, *gradient = &args->dattn_mask;
  SL_REQUIRE(!mask->data || mask->dtype == SL_BOOL || is_number(mask->dtype), SL_UNSUPPORTED,
             "attn_mask.dtype is %s, expected bool, float32, bfloat16, float16 or float64", sl_dtype_name(mask->dtype));
  if (tensors == SL_FORWARD_TENSORS || !gradient->data) return SL_OK;
  SL_REQUIRE(mask->data && is_number(mask->dtype), SL_INVALID_ARGUMENT,
             "dattn_mask.data is given, expected NULL without an attn_mask of numbers");
  sl_dtype expected = args->dtype == SL_F64 ? SL_F64 : SL_F32;
  SL_REQUIRE(gradient->dtype == expected, SL_INVALID_ARGUMENT, "dattn_mask.dtype is %s, expected %s",
             sl_dtype_name(gradient->dtype), sl_dtype_name(expected));
  return SL_OK;
}

/* Rows of k and v are named by one number, block * rows + row. */
static sl_status check_page_strides(const sl_gated_attention_args *args) {
  const sl_tensor4 *k = &args->k, *v = &args->v;
  bool whole = k->token_stride > 0 && v->token_stride > 0 && k->batch_stride % k->token_stride == 0 &&
               v->batch_stride % v->token_stride == 0;
  SL_REQUIRE(whole && k->batch_stride / k->token_stride == v->batch_stride / v->token_stride, SL_INVALID_ARGUMENT,
             "the strides from block to block are %lld in k and %lld in v, those from token to token %lld and %lld, "
             "expected one to be the same multiple of the other in both",
             (long long)k->batch_stride, (long long)v->batch_stride, (long long)k->token_stride,
             (long long)v->token_stride);
  int64_t rows = k->batch_stride / k->token_stride;
  SL_REQUIRE(rows >= 0 && (rows == 0 || args->blocks <= largest_count / rows), SL_OUT_OF_RANGE,
             "the stride from block to block is %lld rows, with blocks = %lld, expected at most 2^31 rows",
             (long long)rows, (long long)args->blocks);
  return SL_OK;
}

/* Every block that a valid key needs. */
static sl_status check_block_table(const sl_gated_attention_args *args) {
  if (args->batch == 0 || args->n_k == 0) return SL_OK;
  SL_CHECK(check_page_strides(args));
  for (int64_t batch = 0; batch < args->batch; ++batch) {
    int64_t begin = args->key_range ? args->key_range[2 * batch] : 0;
    int64_t end = args->key_range ? args->key_range[2 * batch + 1] : args->n_k;
    if (begin == end) continue;
    SL_REQUIRE((end - 1) / args->block_size < args->max_blocks, SL_INVALID_ARGUMENT,
               "batch entry %lld has keys up to %lld, expected at most max_blocks * block_size = %lld * %lld",
               (long long)batch, (long long)end, (long long)args->max_blocks, (long long)args->block_size);
    for (int64_t column = begin / args->block_size; column <= (end - 1) / args->block_size; ++column) {
      int32_t block = args->block_table[batch * args->max_blocks + column];
      SL_REQUIRE(-1 <= block && block < args->blocks, SL_INVALID_ARGUMENT,
                 "block_table[%lld][%lld] is %d, expected 0 <= block < %lld, or -1 where the keys were dropped",
                 (long long)batch, (long long)column, (int)block, (long long)args->blocks);
    }
  }
  return SL_OK;
}

static sl_status check_key_range(const sl_gated_attention_args *args) {
  for (int64_t batch = 0; args->key_range && batch < args->batch; ++batch) {
    int64_t begin = args->key_range[2 * batch], end = args->key_range[2 * batch + 1];
    SL_REQUIRE(0 <= begin && begin <= end && end <= args->n_k, SL_INVALID_ARGUMENT,
               "key_range[%lld] is [%lld, %lld), expected 0 <= begin <= end <= n_k = %lld", (long long)batch,
               (long long)begin, (long long)end, (long long)args->n_k);
  }
  return SL_OK;
}

static sl_status check_places(const sl_gated_attention_args *args) {
  for (int64_t batch = 0; args->q_offset && batch < args->batch; ++batch) {
    int64_t offset = args->q_offset[batch];
    if (args->block_table) {
      SL_REQUIRE(-args->n_q <= offset && offset <= args->n_k - args->n_q, SL_INVALID_ARGUMENT,
                 "q_offset[%lld] is %lld, expected -n_q = %lld <= q_offset <= n_k - n_q = %lld", (long long)batch,
                 (long long)offset, (long long)-args->n_q, (long long)(args->n_k - args->n_q));
      continue;
    }
    SL_REQUIRE(0 <= offset && offset <= args->n_k - args->n_q, SL_INVALID_ARGUMENT,
               "q_offset[%lld] is %lld, expected 0 <= q_offset <= n_k - n_q = %lld, so that the queries lie among the "
               "keys",
               (long long)batch, (long long)offset, (long long)(args->n_k - args->n_q));
  }
  for (int64_t batch = 0; args->text_begin && batch < args->batch; ++batch) {
    int64_t begin = args->text_begin[batch], key_begin = args->key_range ? args->key_range[2 * batch] : 0;
    SL_REQUIRE(-largest_count <= begin && begin <= key_begin, SL_INVALID_ARGUMENT,
               "text_begin[%lld] is %lld, expected -2^31 <= text_begin <= %lld, the first valid key", (long long)batch,
               (long long)begin, (long long)key_begin);
  }
  return SL_OK;
}

sl_status sl_gated_attention_validate(const sl_gated_attention_args *args, sl_attention_tensors tensors) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_CHECK(check_sizes(args));
  if (tensors == SL_NO_TENSORS) return SL_OK;
  int64_t queries = args->batch * args->heads_q * args->n_q;
  int64_t keys = args->batch * args->heads_kv * args->n_k;
  if (args->block_table) {
    SL_REQUIRE(tensors == SL_FORWARD_TENSORS, SL_UNSUPPORTED,
               "block_table is given, expected NULL: a paged cache has no gradient");
    keys = args->blocks * args->heads_kv * args->block_size;
  }
  SL_CHECK(check_pointer("q", args->q.data, queries));
  SL_CHECK(check_pointer("k", args->k.data, keys));
  SL_CHECK(check_pointer("v", args->v.data, keys));
  SL_CHECK(check_pointer("a", args->a.data, queries));
  SL_CHECK(check_pointer("b", args->b.data, keys));
  SL_CHECK(check_pointer("out", args->out.data, queries));
  SL_CHECK(check_key_range(args));
  if (args->block_table) SL_CHECK(check_block_table(args));
  SL_CHECK(check_places(args));
  SL_CHECK(check_masks(args, tensors));
  SL_REQUIRE(args->dropout_seed || args->dropout_p == 0, SL_INVALID_ARGUMENT,
             "dropout_seed is NULL, expected a number where dropout_p is %g", args->dropout_p);
  if (tensors == SL_FORWARD_TENSORS) return SL_OK;
  SL_CHECK(check_pointer("lse", args->lse.data, queries));
  SL_CHECK(check_pointer("dout", args->dout.data, queries));
  SL_CHECK(check_pointer("dq", args->dq.data, queries));
  SL_CHECK(check_pointer("dk", args->dk.data, keys));
  SL_CHECK(check_pointer("dv", args->dv.data, keys));
  SL_CHECK(check_pointer("da", args->da.data, queries));
  if (args->output_gate.data) SL_CHECK(check_pointer("doutput_gate", args->doutput_gate.data, queries));
  return check_pointer("db", args->db.data, keys);
}

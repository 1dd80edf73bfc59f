/* From the lengths of sequences in a paged cache to the places that the kernels go by. */
#include <sluice/gated_attention.h>

#include "attention/validate.h"
#include "runtime/status.h"

static int64_t read_length(const void *lengths, sl_dtype dtype, int64_t batch) {
  return dtype == SL_I64 ? ((const int64_t *)lengths)[batch] : ((const int32_t *)lengths)[batch];
}

sl_status sl_gated_attention_place_pages(sl_gated_attention_args *args, const void *block_table, const void *seqlens_k,
                                         sl_dtype seqlens_dtype, int64_t *places) {
  static const int32_t no_blocks = -1; /* an empty table may have no address, and this is a paged cache all the same */
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  args->block_table = block_table ? block_table : &no_blocks;
  args->n_k = 0;
  SL_CHECK(sl_gated_attention_validate(args, SL_NO_TENSORS));
  SL_REQUIRE(seqlens_dtype == SL_I32 || seqlens_dtype == SL_I64, SL_UNSUPPORTED,
             "seqlens_k is %s, expected int32 or int64", sl_dtype_name(seqlens_dtype));
  SL_REQUIRE(args->batch == 0 || (seqlens_k && places), SL_INVALID_ARGUMENT,
             "seqlens_k or places is NULL, expected %lld and %lld elements", (long long)args->batch,
             (long long)(3 * args->batch));
  const int64_t *given = args->q_offset;
  int64_t most = args->max_blocks * args->block_size, *key_range = places, *q_offset = places + 2 * args->batch;
  for (int64_t batch = 0; batch < args->batch; ++batch) {
    int64_t length = read_length(seqlens_k, seqlens_dtype, batch);
    SL_REQUIRE(0 <= length && length <= most, SL_INVALID_ARGUMENT,
               "seqlens_k[%lld] is %lld, expected 0 to max_blocks * block_size = %lld * %lld", (long long)batch,
               (long long)length, (long long)args->max_blocks, (long long)args->block_size);
    int64_t offset = given ? given[batch] : length - args->n_q;
    SL_REQUIRE(-args->n_q <= offset && offset <= most, SL_INVALID_ARGUMENT,
               "q_offset[%lld] is %lld, expected -n_q = %lld to max_blocks * block_size = %lld", (long long)batch,
               (long long)offset, (long long)-args->n_q, (long long)most);
    key_range[2 * batch] = 0;
    key_range[2 * batch + 1] = length;
    q_offset[batch] = offset;
    if (length > args->n_k) args->n_k = length;
    if (offset + args->n_q > args->n_k) args->n_k = offset + args->n_q;
  }
  args->key_range = key_range;
  args->q_offset = q_offset;
  return SL_OK;
}

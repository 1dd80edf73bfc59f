/* The reductions of one integer type, in loops that the compiler turns into vectors. Included by plain.h once for
 * each type, with NAME(x), ELEMENT and BITS, the unsigned type of its size, in which sums wrap around. */

/* At any address, and whatever the memory was declared as. */
typedef ELEMENT NAME(loose) __attribute__((aligned(1), may_alias));

enum { NAME(tile) = TILE_BYTES / sizeof(ELEMENT) };

/* 1u makes products of 16 bits unsigned: they would overflow an int. */
static void NAME(fold)(sl_reduce_op op, ELEMENT *restrict sum, const NAME(loose) *restrict in, size_t count) {
  switch (op) {
    case SL_REDUCE_PRODUCT:
      for (size_t i = 0; i < count; ++i) sum[i] = (ELEMENT)(1u * (BITS)sum[i] * (BITS)in[i]);
      break;
    case SL_REDUCE_MIN:
      for (size_t i = 0; i < count; ++i) sum[i] = in[i] < sum[i] ? in[i] : sum[i];
      break;
    case SL_REDUCE_MAX:
      for (size_t i = 0; i < count; ++i) sum[i] = in[i] > sum[i] ? in[i] : sum[i];
      break;
    case SL_REDUCE_BAND:
      for (size_t i = 0; i < count; ++i) sum[i] = (ELEMENT)(sum[i] & in[i]);
      break;
    case SL_REDUCE_BOR:
      for (size_t i = 0; i < count; ++i) sum[i] = (ELEMENT)(sum[i] | in[i]);
      break;
    case SL_REDUCE_BXOR:
      for (size_t i = 0; i < count; ++i) sum[i] = (ELEMENT)(sum[i] ^ in[i]);
      break;
    default:
      for (size_t i = 0; i < count; ++i) sum[i] = (ELEMENT)((BITS)sum[i] + (BITS)in[i]);
      break;
  }
}

static void NAME(reduce)(const sl_reduce_args *args) {
  ELEMENT sum[NAME(tile)];
  for (size_t first = 0; first < args->count; first += NAME(tile)) {
    size_t left = args->count - first, count = left < NAME(tile) ? left : NAME(tile);
    memcpy(sum, (const NAME(loose) *)args->in[0] + first, count * sizeof *sum);
    for (int source = 1; source < args->sources; ++source) {
      NAME(fold)(args->op, sum, (const NAME(loose) *)args->in[source] + first, count);
    }
    if (args->op == SL_REDUCE_AVG) {
      for (size_t i = 0; i < count; ++i) sum[i] = (ELEMENT)(sum[i] / args->sources);
    }
    memcpy((NAME(loose) *)args->out + first, sum, count * sizeof *sum);
  }
}

#undef NAME
#undef ELEMENT
#undef BITS

/* The reductions of one floating-point type, in loops that the compiler turns into vectors. Included by scalar.c
 * once for each type, with NAME(x), ELEMENT, the type in memory, SUM, that of the sum, and WIDEN(x) and NARROW(x)
 * between them. */

/* At any address, and whatever the memory was declared as. */
typedef ELEMENT NAME(loose) __attribute__((aligned(1), may_alias));

enum { NAME(tile) = TILE_BYTES / sizeof(SUM) };

static void NAME(fold)(sl_reduce_op op, SUM factor, SUM *restrict sum, const NAME(loose) *restrict in, size_t count) {
  switch (op) {
    case SL_REDUCE_PRODUCT:
      for (size_t i = 0; i < count; ++i) sum[i] = sum[i] * WIDEN(in[i]);
      break;
    case SL_REDUCE_PREMUL_SUM:
      for (size_t i = 0; i < count; ++i) sum[i] = sum[i] + WIDEN(in[i]) * factor;
      break;
    case SL_REDUCE_MIN:
      for (size_t i = 0; i < count; ++i) {
        SUM x = WIDEN(in[i]);
        sum[i] = x != x || x < sum[i] ? x : sum[i];
      }
      break;
    case SL_REDUCE_MAX:
      for (size_t i = 0; i < count; ++i) {
        SUM x = WIDEN(in[i]);
        sum[i] = x != x || x > sum[i] ? x : sum[i];
      }
      break;
    default:
      for (size_t i = 0; i < count; ++i) sum[i] = sum[i] + WIDEN(in[i]);
      break;
  }
}

static void NAME(reduce)(const sl_reduce_args *args) {
  SUM sum[NAME(tile)], factor = (SUM)args->factor, divisor = (SUM)args->sources;
  for (size_t first = 0; first < args->count; first += NAME(tile)) {
    size_t left = args->count - first, count = left < NAME(tile) ? left : NAME(tile);
    const NAME(loose) *in = (const NAME(loose) *)args->in[0] + first;
    for (size_t i = 0; i < count; ++i) sum[i] = WIDEN(in[i]);
    if (args->op == SL_REDUCE_PREMUL_SUM) {
      for (size_t i = 0; i < count; ++i) sum[i] *= factor;
    }
    for (int source = 1; source < args->sources; ++source) {
      NAME(fold)(args->op, factor, sum, (const NAME(loose) *)args->in[source] + first, count);
    }
    if (args->op == SL_REDUCE_AVG) {
      for (size_t i = 0; i < count; ++i) sum[i] /= divisor;
    }
    NAME(loose) *out = (NAME(loose) *)args->out + first;
    for (size_t i = 0; i < count; ++i) out[i] = NARROW(sum[i]);
  }
}

#undef NAME
#undef ELEMENT
#undef SUM
#undef WIDEN
#undef NARROW

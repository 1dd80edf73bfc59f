/* Shares micro-batches over ranks, as ops/sluice/balance.h describes. */
#include <math.h>

#include "plan/balance.h"
#include "runtime/status.h"

static double end_of(const sl_share_args *args, int64_t rank, int64_t share) {
  return (args->fixed_s ? args->fixed_s[rank] : 0) + (double)share * args->micro_batch_s[rank];
}

static int64_t most_of(const sl_share_args *args, int64_t rank) {
  return args->most && args->most[rank] < args->micro_batches ? args->most[rank] : args->micro_batches;
}

/* The largest share with which a rank is done by `time`, within its limits; by rounding one less. */
static int64_t share_until(const sl_share_args *args, int64_t rank, double time) {
  int64_t most = most_of(args, rank);
  double ideal = floor((time - end_of(args, rank, 0)) / args->micro_batch_s[rank]);
  int64_t share = ideal >= (double)most ? most : ideal <= (double)args->least ? args->least : (int64_t)ideal;
  while (share > args->least && end_of(args, rank, share) > time) --share; /* the division has rounded up */
  return share;
}

static int64_t count_until(const sl_share_args *args, double time) {
  int64_t count = 0;
  for (int64_t r = 0; r < args->ranks; ++r) count += share_until(args, r, time);
  return count;
}

/* A time by which no more than all micro-batches are done: the shares until then are a beginning of the order in which
 * they are handed out one by one. */
static double find_start(const sl_share_args *args) {
  double low = 0, high = 0;
  for (int64_t r = 0; r < args->ranks; ++r) high = fmax(high, end_of(args, r, args->micro_batches));
  if (count_until(args, high) <= args->micro_batches) return high;
  for (int i = 0; i < 64; ++i) {
    double middle = low + (high - low) / 2;
    if (count_until(args, middle) <= args->micro_batches)
      low = middle;
    else
      high = middle;
  }
  return low;
}

sl_status sl_share_micro_batches(const sl_share_args *args, double *max_s) {
  SL_CHECK(sl_share_validate(args, max_s));
  double start = find_start(args);
  int64_t left = args->micro_batches;
  for (int64_t r = 0; r < args->ranks; ++r) left -= args->shares[r] = share_until(args, r, start);
  for (; left > 0; --left) {
    int64_t next = -1;
    for (int64_t r = 0; r < args->ranks; ++r) {
      if (args->shares[r] == most_of(args, r)) continue;
      if (next < 0 || end_of(args, r, args->shares[r] + 1) < end_of(args, next, args->shares[next] + 1)) next = r;
    }
    ++args->shares[next];
  }
  *max_s = 0;
  for (int64_t r = 0; r < args->ranks; ++r) *max_s = fmax(*max_s, end_of(args, r, args->shares[r]));
  return SL_OK;
}

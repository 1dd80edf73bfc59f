/* Where a forward's time goes, for benchmarks: off unless sl_attention_profile_begin was called, and then seconds are
 * summed over all workers. While it is off, a part costs a look at one number for a chunk of keys or of queries. */
#ifndef SL_ATTENTION_PROFILE_H
#define SL_ATTENTION_PROFILE_H

#include <sluice/gated_attention.h>

#include "attention/kernel.h"

/* The fields of sl_attention_profile, in its order. */
typedef enum sl_profile_part {
  SL_PROFILE_BUSY,
  SL_PROFILE_SORT,
  SL_PROFILE_PACK,
  SL_PROFILE_ROWS,
  SL_PROFILE_SCORES,
  SL_PROFILE_SOFTMAX,
  SL_PROFILE_VALUES,
  SL_PROFILE_PARTS
} sl_profile_part;

extern int64_t sl_profile_is_on;

int64_t sl_profile_now(void);
void sl_profile_note(sl_profile_part part, int64_t begun);

/* begun of a part: 0 while nobody asks. */
static inline int64_t sl_profile_start(void) { return sl_profile_is_on ? sl_profile_now() : 0; }

static inline void sl_profile_end(sl_profile_part part, int64_t begun) {
  if (begun) sl_profile_note(part, begun);
}

/* The same table, with its products and its softmax timed and the pairs counted that they go over; the table itself
 * while nobody asks. */
const sl_attention_kernel *sl_profile_kernel(const sl_attention_kernel *kernel);

#endif

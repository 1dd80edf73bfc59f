/* Whether a long call puts its pieces into the slots through the caches or past them. Which is faster, by up to a
 * factor of two either way, depends on how far apart the ranks' processors are, which a guest of a hypervisor isn't
 * told and which changes under it. So it is measured as the call goes on: now and then a few steps are made the other
 * way, and the way that took less time for a byte is kept. No result depends on it. */
#ifndef SL_COMM_PACE_H
#define SL_COMM_PACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SL_PACE_KINDS = 16 /* sl_call_kind is less */ };

typedef struct sl_pace {
  float cost[SL_PACE_KINDS][2]; /* ns a byte of steps through the caches, and past them; 0: not known */
  bool streaming;               /* the way of this step: past the caches */
  unsigned run;                 /* steps that were made this way before it, one after another */
  int64_t began;                /* this step; 0: not within a call of several steps */
  size_t bytes;                 /* that this step has put */
} sl_pace;

/* Begins a step of a call of this kind. step: the number that it has on all ranks, so that they try things at the same
 * time. now: in ns, when the step before it of the same call was over; 0: it is the call's first. */
void sl_pace_step(sl_pace *pace, unsigned kind, uint32_t step, int64_t now);

#endif

/* Waiting for a moment without sleeping: for as long as waking up would take, where this rank has a processor of its
 * own; and where it hasn't, letting others run a few times, which is cheaper than sleeping. */
#ifndef SL_COMM_SPIN_H
#define SL_COMM_SPIN_H

#include <sched.h>
#include <stdbool.h>

enum { SL_SPINS = 4000 /* some 50 us */, SL_SPINS_CROWDED = 100, SL_YIELDS_CROWDED = 20 };

typedef struct sl_spin {
  int spins, yields;
} sl_spin;

static inline sl_spin sl_spin_begin(bool crowded) {
  sl_spin spin = {crowded ? SL_SPINS_CROWDED : SL_SPINS, crowded ? SL_YIELDS_CROWDED : 0};
  return spin;
}

/* False: enough, sleep now. */
static inline bool sl_spin_once(sl_spin *spin) {
  if (spin->spins > 0) {
    --spin->spins;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
    return true;
  }
  if (spin->yields == 0) return false;
  --spin->yields;
  sched_yield();
  return true;
}

#endif

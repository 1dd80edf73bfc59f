/* Waiting for a moment without sleeping: for as long as waking up would take, where this rank has a processor of its
 * own, and for hardly any time where another rank may need this one. Never sched_yield(): it gives a turn away to
 * whatever else runs on the machine, where sleeping keeps the claim to it. */
#ifndef SL_COMM_SPIN_H
#define SL_COMM_SPIN_H

#include <stdbool.h>

enum { SL_SPINS = 4000 /* some 50 us */, SL_SPINS_CROWDED = 100 };

typedef struct sl_spin {
  int left;
} sl_spin;

static inline sl_spin sl_spin_begin(bool crowded) {
  sl_spin spin = {crowded ? SL_SPINS_CROWDED : SL_SPINS};
  return spin;
}

/* False: enough, sleep now. */
static inline bool sl_spin_once(sl_spin *spin) {
  if (spin->left == 0) return false;
  --spin->left;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
  return true;
}

#endif

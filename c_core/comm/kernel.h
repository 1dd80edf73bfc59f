/* The kernel table: what one instruction-set tier supplies for the arithmetic of the collectives. */
#ifndef SL_COMM_KERNEL_H
#define SL_COMM_KERNEL_H

#include <sluice/cpu.h>

#include "comm/reduce.h"

typedef struct sl_reduce_kernel {
  const char *name;
  sl_isa isa;
  void (*reduce)(const sl_reduce_args *args);                      /* sl_reduce */
  void (*copy_streaming)(void *out, const void *in, size_t bytes); /* sl_copy_streaming */
} sl_reduce_kernel;

/* The kernel number i of kernels.def, NULL behind the last. */
const sl_reduce_kernel *sl_reduce_list_kernels(int number);

/* The one that this machine runs, as capped by SLUICE_ISA. */
const sl_reduce_kernel *sl_reduce_find_kernel(void);

#endif

/* Chooses the kernel of this machine for the arithmetic of the collectives. */
#include "comm/reduce.h"

#include "comm/kernel.h"

#define SL_REDUCE_KERNEL(name) extern const sl_reduce_kernel sl_reduce_##name;
#include "comm/kernels.def"
#undef SL_REDUCE_KERNEL

static const sl_reduce_kernel *const kernels[] = {
#define SL_REDUCE_KERNEL(name) &sl_reduce_##name,
#include "comm/kernels.def"
#undef SL_REDUCE_KERNEL
};
enum { KERNEL_COUNT = sizeof kernels / sizeof kernels[0] };

const sl_reduce_kernel *sl_reduce_list_kernels(int number) {
  return number >= 0 && number < KERNEL_COUNT ? kernels[number] : NULL;
}

const sl_reduce_kernel *sl_reduce_find_kernel(void) {
  int i = 0;
  while (kernels[i]->isa > sl_cpu_isa()) ++i; /* ends: the last one is scalar */
  return kernels[i];
}

void sl_reduce(const sl_reduce_args *args) { sl_reduce_find_kernel()->reduce(args); }

void sl_copy_streaming(void *out, const void *in, size_t bytes) {
  if (bytes) sl_reduce_find_kernel()->copy_streaming(out, in, bytes);
}

/* The list of kernel tables, and the choice among them. */
#include <stddef.h>

#include "quantize/kernel.h"

#define SL_QUANTIZE_KERNEL(name) extern const sl_quantize_kernel sl_quantize_##name;
#include "quantize/kernels.def"
#undef SL_QUANTIZE_KERNEL

static const sl_quantize_kernel *const kernels[] = {
#define SL_QUANTIZE_KERNEL(name) &sl_quantize_##name,
#include "quantize/kernels.def"
#undef SL_QUANTIZE_KERNEL
};
enum { KERNEL_COUNT = sizeof kernels / sizeof kernels[0] };

const sl_quantize_kernel *sl_quantize_list_kernels(int number) {
  return number >= 0 && number < KERNEL_COUNT ? kernels[number] : NULL;
}

const sl_quantize_kernel *sl_quantize_find_kernel(void) {
  int i = 0;
  while (kernels[i]->isa > sl_cpu_isa()) ++i; /* ends: the last one is scalar */
  return kernels[i];
}

const char *sl_quantize_kernel_name(void) { return sl_quantize_find_kernel()->name; }

int64_t sl_quantize_run_peak(int64_t count) { return count > 0 ? sl_quantize_find_kernel()->run_peak(count) : 0; }

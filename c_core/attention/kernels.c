/* The list of micro-op tables, and the choice among them. */
#include <stddef.h>

#include "attention/kernel.h"

#define SL_ATTENTION_KERNEL(name) extern const sl_attention_kernel sl_attention_##name;
#include "attention/kernels.def"
#undef SL_ATTENTION_KERNEL

static const sl_attention_kernel *const kernels[] = {
#define SL_ATTENTION_KERNEL(name) &sl_attention_##name,
#include "attention/kernels.def"
#undef SL_ATTENTION_KERNEL
};
enum { KERNEL_COUNT = sizeof kernels / sizeof kernels[0] };

const sl_attention_kernel *sl_attention_list_kernels(int number) {
  return number >= 0 && number < KERNEL_COUNT ? kernels[number] : NULL;
}

const sl_attention_kernel *sl_attention_find_kernel(sl_dtype dtype, sl_isa isa) {
  for (int i = 0; i < KERNEL_COUNT; ++i) {
    if (kernels[i]->dtype == dtype && kernels[i]->isa <= isa) return kernels[i];
  }
  return NULL;
}

/* The tiled backward, and the memory that it needs. */
#ifndef SL_ATTENTION_BACKWARD_H
#define SL_ATTENTION_BACKWARD_H

#include "attention/plan.h"

sl_attention_plan sl_attention_make_backward_plan(const sl_gated_attention_args *args,
                                                  const sl_attention_kernel *kernel);
sl_status sl_attention_backward_workspace(const sl_attention_plan *plan, size_t *bytes);
sl_status sl_attention_run_backward(const sl_attention_plan *plan);

#endif

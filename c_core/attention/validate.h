/* Checks of sl_gated_attention_args that every entry point shares. */
#ifndef SL_ATTENTION_VALIDATE_H
#define SL_ATTENTION_VALIDATE_H

#include <sluice/gated_attention.h>

/* Which data pointers must be there. */
typedef enum sl_attention_tensors {
  SL_NO_TENSORS,       /* sizes only: a workspace query */
  SL_FORWARD_TENSORS,  /* q, k, v, a, b, out */
  SL_BACKWARD_TENSORS, /* those, lse, dout, dq, dk, dv, da, db */
} sl_attention_tensors;

sl_status sl_gated_attention_validate(const sl_gated_attention_args *args, sl_attention_tensors tensors);

#endif

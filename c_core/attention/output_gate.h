/* The gate on the output: sigmoid(o_i) times what the softmax gives. */
#ifndef SL_ATTENTION_OUTPUT_GATE_H
#define SL_ATTENTION_OUTPUT_GATE_H

#include "attention/plan.h"

/* Multiplies the row of a query by its gate; nothing without one. */
void sl_output_gate_apply(const sl_gated_attention_args *args, int64_t batch, int64_t head, int64_t query, float *row);

/* Bytes of workspace of the backward: dout times the gate. */
size_t sl_output_gate_bytes(const sl_gated_attention_args *args);

/* Writes doutput_gate, and the gradient of the output before the gate to the workspace; returns where that lies: dout
 * itself without a gate. */
sl_tensor4 sl_output_gate_differentiate(const sl_gated_attention_args *args, void *workspace);

#endif

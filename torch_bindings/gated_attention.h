// The gated_attention operators, registered for each kind of device by a file of its own.
#pragma once

#include <tuple>

#include "shim.h"

namespace sluice {

std::tuple<Tensor, Tensor, Tensor> gated_attention(
    Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, std::optional<Tensor> logit_tau, std::optional<Tensor> key_range,
    std::optional<Tensor> q_offset, std::optional<Tensor> text_begin, std::optional<Tensor> attn_mask,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> output_gate, std::optional<Tensor> dropout_seed,
    bool causal, int64_t window, int64_t sinks, int64_t sliding_window, double softcap, double dropout_p, double scale);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_attention_backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b,
    std::optional<Tensor> logit_tau, std::optional<Tensor> key_range, std::optional<Tensor> q_offset,
    std::optional<Tensor> text_begin, std::optional<Tensor> attn_mask, std::optional<Tensor> alibi_slopes,
    std::optional<Tensor> output_gate, std::optional<Tensor> dropout_seed, Tensor out, Tensor lse, bool causal,
    int64_t window, int64_t sinks, int64_t sliding_window, double softcap, double dropout_p, double scale,
    bool mask_gradient);

}  // namespace sluice

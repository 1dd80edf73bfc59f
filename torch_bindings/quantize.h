// What the shims of linear layers, convolutions and recurrent layers share: checks, and weights for the C core.
#pragma once

#include <sluice/quantize.h>

#include "shim.h"

namespace sluice {

using OptionalTensor = std::optional<Tensor>;

void check_values(const char *name, const Tensor &tensor);  // throws unless float32, bfloat16 or float16
void check_device(const char *name, const Tensor &tensor);  // throws unless on the CPU

Tensor as_contiguous(const Tensor &tensor);

// The number as a width, for the C core to check; throws where it would not fit into its type.
int32_t narrow(const char *name, int64_t value);

sl_quantized_weight make_weight(int64_t out_features, int64_t in_features, int64_t groups, int64_t bits,
                                int64_t group_size);

// The names under which an operator takes a weight.
struct WeightNames {
  const char *packed, *scale;
};

// Checks packed and scale against the sizes of the weight, and points it to them.
void attach_weight(sl_quantized_weight &weight, const Tensor &packed, const Tensor &scale,
                   WeightNames names = {"packed", "weight_scale"});

// The bias in float32, contiguous.
OptionalTensor prepare_bias(const OptionalTensor &bias, int64_t out_features, const char *name = "bias");

inline decltype(sl_linear_dynamic_args::bias) data_of(const OptionalTensor &bias) {
  return bias ? static_cast<decltype(sl_linear_dynamic_args::bias)>(bias->const_data_ptr()) : nullptr;
}

// The workspace of a call; its address is a multiple of 64 in torch's CPU allocator.
template <typename Args>
Tensor allocate_workspace(Args &args, sl_status (*measure)(const Args *, size_t *), const Tensor &like) {
  size_t bytes = 0;
  check_status(measure(&args, &bytes));
  Tensor workspace = empty({static_cast<int64_t>(bytes < 64 ? 64 : bytes)}, ScalarType::Byte, like);
  args.workspace = workspace.mutable_data_ptr(), args.workspace_size = bytes;
  return workspace;
}

}  // namespace sluice

// What the attention shims share: checks of tensors against each other, and views of them for C.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <sluice/gated_attention.h>

#include "shim.h"

namespace sluice {

using OptionalTensor = std::optional<Tensor>;

std::string shape_text(const std::vector<int64_t> &shape);  // "[2, 8, 128]"

// Throws unless the tensor has this shape and dtype (the message says "expected <expected>") and is on the device of
// like, which is q.
void check_attention_tensor(const char *name, const Tensor &tensor, const std::vector<int64_t> &shape, ScalarType dtype,
                            const std::string &expected, const Tensor &like);

// The kernels read rows of channels: only the last stride must be 1. (A clone would keep the strides.)
Tensor with_dense_rows(const Tensor &tensor);

sl_tensor4 view4(const Tensor &tensor);
sl_tensor3 view3(const Tensor &tensor);

// A mask is [batch or 1, heads_q or 1, n_q or 1, n_k or 1], of sizes full.
void check_mask(const Tensor &mask, const std::vector<int64_t> &full, const Tensor &q);
// Of a mask or of its gradient in this dtype; without elements, absent.
sl_attention_mask view_mask(const Tensor &mask, sl_dtype dtype);
sl_attention_mask view_mask(const OptionalTensor &mask);

const int64_t *integers_of(const OptionalTensor &tensor);

}  // namespace sluice

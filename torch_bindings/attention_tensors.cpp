// Checks and views that the attention shims share.
#include "attention_tensors.h"

namespace sluice {
namespace {

void check_attention_device(const char *name, const Tensor &tensor, const Tensor &like) {
  if (tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index()) return;
  fail(std::string(name) + " is " + describe(tensor) + ", expected the device of q, which is " + describe(like));
}

}  // namespace

std::string shape_text(const std::vector<int64_t> &shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void check_attention_tensor(const char *name, const Tensor &tensor, const std::vector<int64_t> &shape, ScalarType dtype,
                            const std::string &expected, const Tensor &like) {
  bool same = static_cast<size_t>(tensor.dim()) == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  if (!same || tensor.scalar_type() != dtype) {
    fail(std::string(name) + " is " + describe(tensor) + ", expected " + expected);
  }
  check_attention_device(name, tensor, like);
}

Tensor with_dense_rows(const Tensor &tensor) {
  return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

sl_tensor4 view4(const Tensor &tensor) {
  return {const_cast<void *>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

sl_tensor3 view3(const Tensor &tensor) {
  return {const_cast<void *>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_mask(const Tensor &mask, const std::vector<int64_t> &full, const Tensor &q) {
  bool fits = mask.dim() == 4;
  for (size_t i = 0; fits && i < 4; ++i) {
    int64_t size = mask.size(static_cast<int64_t>(i));
    fits = size == full[i] || size == 1;
  }
  if (!fits) {
    fail("attn_mask is " + describe(mask) + ", expected [batch, heads_q, n_q, n_k] = " + shape_text(full) +
         ", or 1 instead of any of them");
  }
  check_attention_device("attn_mask", mask, q);
}

sl_attention_mask view_mask(const Tensor &mask, sl_dtype dtype) {
  int64_t stride[4];
  for (int64_t i = 0; i < 4; ++i) stride[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
  return {const_cast<void *>(mask.const_data_ptr()), dtype, stride[0], stride[1], stride[2], stride[3]};
}

sl_attention_mask view_mask(const OptionalTensor &mask) {
  if (!mask || !mask->numel()) return {};
  return view_mask(*mask, mask->scalar_type() == ScalarType::Bool ? SL_BOOL : dtype_of(*mask, "attn_mask"));
}

const int64_t *integers_of(const OptionalTensor &tensor) {
  return tensor ? static_cast<const int64_t *>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace sluice

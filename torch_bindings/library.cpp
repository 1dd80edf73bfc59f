// The sluice:: operator library: schemas of all families, and the helpers that their shims share.
#include "shim.h"

#include <new>
#include <stdexcept>

#include <sluice/accumulate.h>
#include <sluice/gated_attention.h>
#include <sluice/prune.h>
#include <sluice/quantize.h>
#include <sluice/quantize_recurrent.h>
#include <sluice/status.h>

namespace sluice {

namespace {

void run_on_torch_pool(void *, int64_t count, sl_range_function function, void *context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { function(context, begin, end); });
}

std::string device_text(const Tensor &tensor) {
  if (tensor.is_cpu()) return "cpu";
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  if (type == aoti_torch_device_type_meta()) return "meta";
  std::string index = std::to_string(tensor.get_device_index());
  return tensor.is_cuda() ? "cuda:" + index : "device " + index + " of type " + std::to_string(type);
}

}  // namespace

sl_executor torch_executor() {
  return {run_on_torch_pool, nullptr, static_cast<int32_t>(torch::stable::get_num_threads())};
}

void check_status(sl_status status) {
  switch (status) {
    case SL_OK: return;
    case SL_INVALID_ARGUMENT: throw std::invalid_argument(sl_last_error());
    case SL_OUT_OF_RANGE: throw std::out_of_range(sl_last_error());
    case SL_OUT_OF_MEMORY: throw std::bad_alloc();
    default: throw std::runtime_error(sl_last_error());
  }
}

void fail(const std::string &message) { throw std::invalid_argument(message); }

sl_dtype dtype_of(const Tensor &tensor, const char *name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return SL_F32;
    case ScalarType::BFloat16: return SL_BF16;
    case ScalarType::Half: return SL_F16;
    case ScalarType::Double: return SL_F64;
    default: fail(std::string(name) + " is " + describe(tensor) + ", expected float32, bfloat16, float16 or float64");
  }
}

std::string describe(const Tensor &tensor) {
  std::string text;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: text = "float32"; break;
    case ScalarType::BFloat16: text = "bfloat16"; break;
    case ScalarType::Half: text = "float16"; break;
    case ScalarType::Double: text = "float64"; break;
    case ScalarType::ComplexFloat: text = "complex64"; break;
    case ScalarType::ComplexDouble: text = "complex128"; break;
    case ScalarType::Long: text = "int64"; break;
    case ScalarType::Int: text = "int32"; break;
    case ScalarType::Short: text = "int16"; break;
    case ScalarType::Char: text = "int8"; break;
    case ScalarType::Byte: text = "uint8"; break;
    case ScalarType::Bool: text = "bool"; break;
    default: text = torch::headeronly::toString(tensor.scalar_type()); break;
  }
  text += " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "] on " + device_text(tensor);
}

Tensor empty_strided(const std::vector<int64_t> &sizes, const std::vector<int64_t> &strides, ScalarType dtype,
                     const Tensor &like) {
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor empty(const std::vector<int64_t> &sizes, ScalarType dtype, const Tensor &like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides, dtype, like);
}

}  // namespace sluice

STABLE_TORCH_LIBRARY(sluice, library) {
  library.def(SL_GATED_ATTENTION_SCHEMA);
  library.def(SL_GATED_ATTENTION_BACKWARD_SCHEMA);
  library.def(SL_GATED_ATTENTION_PAGED_SCHEMA);
  library.def(SL_ACCUMULATE_SCHEMA);
  library.def(SL_MEASURE_GRADIENT_SCHEMA);
  library.def(SL_READ_ACCUMULATOR_SCHEMA);
  library.def(SL_CHANNEL_NORMS_SCHEMA);
  library.def(SL_QUANTIZE_DYNAMIC_SCHEMA);
  library.def(SL_PACK_LINEAR_WEIGHT_SCHEMA);
  library.def(SL_UNPACK_LINEAR_WEIGHT_SCHEMA);
  library.def(SL_LOOKUP_LINEAR_WEIGHT_SCHEMA);
  library.def(SL_LINEAR_DYNAMIC_SCHEMA);
  library.def(SL_PACK_CONV2D_WEIGHT_SCHEMA);
  library.def(SL_CONV2D_DYNAMIC_SCHEMA);
  library.def(SL_LSTM_DYNAMIC_SCHEMA);
  library.def(SL_GRU_DYNAMIC_SCHEMA);
}

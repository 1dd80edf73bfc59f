// Shim of quantize: check shapes and dtypes, allocate, call C.
#include <tuple>

#include "operator.h"
#include "quantize.h"

namespace sluice {

void check_values(const char *name, const Tensor &tensor) {
  ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    fail(std::string(name) + " is " + describe(tensor) + ", expected float32, bfloat16 or float16");
  }
}

void check_device(const char *name, const Tensor &tensor) {
  if (!tensor.is_cpu()) fail(std::string(name) + " is " + describe(tensor) + ", expected it on cpu, as x is");
}

Tensor as_contiguous(const Tensor &tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

int32_t narrow(const char *name, int64_t value) {
  if (value < INT32_MIN || value > INT32_MAX) {
    fail(std::string(name) + " is " + std::to_string(value) + ", expected a number of bits");
  }
  return static_cast<int32_t>(value);
}

sl_quantized_weight make_weight(int64_t out_features, int64_t in_features, int64_t groups, int64_t bits,
                                int64_t group_size) {
  sl_quantized_weight weight{};
  weight.out_features = out_features, weight.in_features = in_features, weight.groups = groups;
  weight.bits = narrow("weight_bits", bits), weight.group_size = group_size;
  return weight;
}

namespace {

struct WeightSizes {
  int64_t bytes, scale_groups, padded_features;
};

WeightSizes sizes_of(const sl_quantized_weight &weight) {
  WeightSizes sizes{};
  check_status(sl_packed_weight_size(&weight, &sizes.bytes, &sizes.scale_groups, &sizes.padded_features));
  return sizes;
}

}  // namespace

void attach_weight(sl_quantized_weight &weight, const Tensor &packed, const Tensor &scale, WeightNames names) {
  check_device(names.packed, packed);
  check_device(names.scale, scale);
  WeightSizes sizes = sizes_of(weight);
  std::string made = " of " + std::to_string(weight.out_features) + " outputs x " + std::to_string(weight.in_features) +
                     " inputs in " + std::to_string(weight.bits) + " bits";
  if (packed.scalar_type() != ScalarType::Byte || packed.dim() != 1 || packed.size(0) != sizes.bytes ||
      !packed.is_contiguous()) {
    fail(std::string(names.packed) + " is " + describe(packed) + ", expected contiguous uint8 [" +
         std::to_string(sizes.bytes) + "], the packed weight" + made);
  }
  if (scale.scalar_type() != ScalarType::Float || scale.dim() != 2 || scale.size(0) != sizes.scale_groups ||
      scale.size(1) != sizes.padded_features || !scale.is_contiguous()) {
    fail(std::string(names.scale) + " is " + describe(scale) + ", expected contiguous float32 [" +
         std::to_string(sizes.scale_groups) + ", " + std::to_string(sizes.padded_features) + "], the scales" + made);
  }
  weight.packed = packed.const_data_ptr();
  weight.scale = static_cast<decltype(weight.scale)>(scale.const_data_ptr());
}

OptionalTensor prepare_bias(const OptionalTensor &bias, int64_t out_features, const char *name) {
  if (!bias) return bias;
  check_values(name, *bias);
  check_device(name, *bias);
  if (bias->dim() != 1 || bias->size(0) != out_features) {
    fail(std::string(name) + " is " + describe(*bias) + ", expected [out_features] = [" + std::to_string(out_features) +
         "]");
  }
  if (bias->scalar_type() == ScalarType::Float) return as_contiguous(*bias);
  Tensor single = empty({out_features}, ScalarType::Float, *bias);
  torch::stable::copy_(single, *bias);
  return single;
}

namespace {

// Rows of all but the last dimension.
int64_t count_rows(const Tensor &x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

void check_has_columns(const Tensor &x) {
  if (x.dim() < 1) fail("x is " + describe(x) + ", expected at least one dimension");
}

std::vector<int64_t> shape_of(const Tensor &x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  return shape;
}

// Channels next to one another, without gaps. A dimension of size 1 has a stride that means nothing.
bool is_channels_last(const Tensor &x) {
  int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t strides[4] = {channels * height * width, 1, width * channels, channels};
  for (int64_t i = 0; i < 4; ++i) {
    if (x.size(i) > 1 && x.stride(i) != strides[i]) return false;
  }
  return true;
}

void copy_pair(const char *name, const std::vector<int64_t> &values, int64_t pair[2]) {
  if (values.size() != 2) {
    fail(std::string(name) + " has " + std::to_string(values.size()) + " numbers, expected height and width");
  }
  pair[0] = values[0], pair[1] = values[1];
}

std::tuple<Tensor, Tensor> pack_weight(const Tensor &values, const sl_quantized_weight &weight) {
  WeightSizes sizes = sizes_of(weight);
  Tensor packed = empty({sizes.bytes}, ScalarType::Byte, values);
  Tensor scale = empty({sizes.scale_groups, sizes.padded_features}, ScalarType::Float, values);
  check_status(sl_pack_weight(&weight, dtype_of(values, "weight"), values.const_data_ptr(), packed.mutable_data_ptr(),
                              static_cast<decltype(sl_quantize_dynamic_args::scale)>(scale.mutable_data_ptr())));
  return {packed, scale};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_dynamic(Tensor x, int64_t bits, double target_sqnr, bool per_token) {
  check_values("x", x);
  check_has_columns(x);
  sl_quantize_dynamic_args args{};
  args.rows = count_rows(x), args.columns = x.size(x.dim() - 1), args.dtype = dtype_of(x, "x");
  args.activation_bits = narrow("bits", bits), args.target_sqnr = target_sqnr;
  args.per_token = per_token;
  sl_executor executor = torch_executor();
  args.executor = &executor;
  Tensor workspace = allocate_workspace(args, sl_quantize_dynamic_workspace_size, x);
  Tensor dense = as_contiguous(x);
  int64_t scales = per_token ? args.rows : 1;
  Tensor q = empty(shape_of(x), bits > 0 && bits <= 8 ? ScalarType::Char : ScalarType::Short, x);
  Tensor scale = empty({scales}, ScalarType::Float, x), chosen = empty({scales}, ScalarType::Char, x);
  args.x = dense.const_data_ptr(), args.q = q.mutable_data_ptr();
  args.scale = static_cast<decltype(args.scale)>(scale.mutable_data_ptr());
  args.bits = static_cast<decltype(args.bits)>(chosen.mutable_data_ptr());
  check_status(sl_quantize_dynamic(&args));
  return {q, scale, chosen};
}

std::tuple<Tensor, Tensor> pack_linear_weight(Tensor weight, int64_t bits, int64_t group_size) {
  check_values("weight", weight);
  if (weight.dim() != 2) fail("weight is " + describe(weight) + ", expected [out_features, in_features]");
  return pack_weight(as_contiguous(weight), make_weight(weight.size(0), weight.size(1), 1, bits, group_size));
}

std::tuple<Tensor, Tensor> pack_conv2d_weight(Tensor weight, int64_t bits, int64_t group_size, int64_t groups) {
  check_values("weight", weight);
  if (weight.dim() != 4) {
    fail("weight is " + describe(weight) + ", expected [out_channels, channels / groups, height, width]");
  }
  int64_t inputs = weight.size(1) * weight.size(2) * weight.size(3);
  sl_quantized_weight sizes = make_weight(weight.size(0), inputs, groups, bits, group_size);
  sizes_of(sizes);  // refuses what is not allowed before anything is copied
  Tensor dense = empty({weight.size(0), weight.size(2), weight.size(3), weight.size(1)}, weight.scalar_type(), weight);
  // The channels of a tap next to one another: a copy through a view with the dimensions of the weight.
  Tensor view = torch::stable::transpose(torch::stable::transpose(dense, 2, 3), 1, 2);
  torch::stable::copy_(view, weight);
  return pack_weight(dense, sizes);
}

Tensor unpack_linear_weight(Tensor packed, Tensor scale, int64_t out_features, int64_t in_features, int64_t bits,
                            int64_t group_size) {
  sl_quantized_weight weight = make_weight(out_features, in_features, 1, bits, group_size);
  attach_weight(weight, packed, scale);
  Tensor values = empty({out_features, in_features}, ScalarType::Float, packed);
  check_status(
      sl_unpack_weight(&weight, static_cast<decltype(sl_quantize_dynamic_args::scale)>(values.mutable_data_ptr())));
  return values;
}

Tensor lookup_linear_weight(Tensor rows, Tensor packed, Tensor scale, int64_t out_features, int64_t in_features,
                            int64_t bits, int64_t group_size) {
  ScalarType dtype = rows.scalar_type();
  if (dtype != ScalarType::Long && dtype != ScalarType::Int) {
    fail("rows is " + describe(rows) + ", expected int64 or int32");
  }
  sl_lookup_weight_args args{};
  args.weight = make_weight(out_features, in_features, 1, bits, group_size);
  attach_weight(args.weight, packed, scale);
  std::vector<int64_t> shape = shape_of(rows);
  args.count = rows.numel();
  Tensor wide = dtype == ScalarType::Long ? as_contiguous(rows) : empty(shape, ScalarType::Long, rows);
  if (dtype != ScalarType::Long) torch::stable::copy_(wide, rows);
  shape.push_back(in_features);
  Tensor values = empty(shape, ScalarType::Float, packed);
  sl_executor executor = torch_executor();
  args.executor = &executor;
  args.rows = static_cast<decltype(args.rows)>(wide.const_data_ptr());
  args.values = static_cast<decltype(args.values)>(values.mutable_data_ptr());
  check_status(sl_lookup_weight(&args));
  return values;
}

std::tuple<Tensor, Tensor> linear_dynamic(Tensor x, Tensor packed, Tensor weight_scale, OptionalTensor bias,
                                          int64_t out_features, int64_t weight_bits, int64_t group_size,
                                          int64_t activation_bits, double target_sqnr, bool per_token,
                                          double outlier_ratio) {
  check_values("x", x);
  check_has_columns(x);
  std::vector<int64_t> shape = shape_of(x);
  sl_linear_dynamic_args args{};
  args.rows = count_rows(x), args.dtype = dtype_of(x, "x");
  args.weight = make_weight(out_features, shape.back(), 1, weight_bits, group_size);
  attach_weight(args.weight, packed, weight_scale);
  OptionalTensor single_bias = prepare_bias(bias, out_features);
  args.bias = data_of(single_bias);
  args.activation_bits = narrow("activation_bits", activation_bits);
  args.target_sqnr = target_sqnr, args.per_token = per_token, args.outlier_ratio = outlier_ratio;
  sl_executor executor = torch_executor();
  args.executor = &executor;
  Tensor workspace = allocate_workspace(args, sl_linear_dynamic_workspace_size, x);
  Tensor dense = as_contiguous(x);
  shape.back() = out_features;
  Tensor out = empty(shape, x.scalar_type(), x), bits = empty({args.rows}, ScalarType::Char, x);
  args.x = dense.const_data_ptr(), args.out = out.mutable_data_ptr();
  args.bits = static_cast<decltype(args.bits)>(bits.mutable_data_ptr());
  check_status(sl_linear_dynamic(&args));
  return {out, bits};
}

std::tuple<Tensor, Tensor> conv2d_dynamic(Tensor x, Tensor packed, Tensor weight_scale, OptionalTensor bias,
                                          int64_t out_channels, std::vector<int64_t> kernel_size,
                                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                                          std::vector<int64_t> dilation, int64_t groups, int64_t weight_bits,
                                          int64_t group_size, int64_t activation_bits, double target_sqnr) {
  check_values("x", x);
  if (x.dim() != 4) fail("x is " + describe(x) + ", expected [images, channels, height, width]");
  sl_conv2d_dynamic_args args{};
  args.images = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  copy_pair("kernel_size", kernel_size, args.kernel);
  copy_pair("stride", stride, args.stride);
  copy_pair("padding", padding, args.padding);
  copy_pair("dilation", dilation, args.dilation);
  if (groups < 1) fail("groups is " + std::to_string(groups) + ", expected at least 1");
  int64_t inputs = 0;
  if (__builtin_mul_overflow(args.kernel[0], args.kernel[1], &inputs) ||
      __builtin_mul_overflow(inputs, args.channels / groups, &inputs)) {
    fail("kernel_size is too large for " + std::to_string(args.channels) + " channels, expected less than 2^31 inputs");
  }
  args.weight = make_weight(out_channels, inputs, groups, weight_bits, group_size);
  attach_weight(args.weight, packed, weight_scale);
  OptionalTensor single_bias = prepare_bias(bias, out_channels);
  args.bias = data_of(single_bias);
  args.dtype = dtype_of(x, "x");
  args.activation_bits = narrow("activation_bits", activation_bits);
  args.target_sqnr = target_sqnr;
  sl_executor executor = torch_executor();
  args.executor = &executor;
  args.channels_last = !x.is_contiguous() && is_channels_last(x);
  int64_t size[2] = {0, 0};
  check_status(sl_conv2d_dynamic_out_size(&args, size));
  Tensor workspace = allocate_workspace(args, sl_conv2d_dynamic_workspace_size, x);
  Tensor dense = args.channels_last ? x : as_contiguous(x);
  std::vector<int64_t> shape = {args.images, out_channels, size[0], size[1]};
  std::vector<int64_t> strides = {out_channels * size[0] * size[1], 1, size[1] * out_channels, out_channels};
  Tensor out =
      args.channels_last ? empty_strided(shape, strides, x.scalar_type(), x) : empty(shape, x.scalar_type(), x);
  Tensor bits = empty({args.images}, ScalarType::Char, x);
  args.x = dense.const_data_ptr(), args.out = out.mutable_data_ptr();
  args.bits = static_cast<decltype(args.bits)>(bits.mutable_data_ptr());
  check_status(sl_conv2d_dynamic(&args));
  return {out, bits};
}

}  // namespace sluice

STABLE_TORCH_LIBRARY_IMPL(sluice, CPU, library) {
  SLUICE_IMPLEMENT(SL_QUANTIZE_DYNAMIC_SCHEMA, sluice::quantize_dynamic);
  SLUICE_IMPLEMENT(SL_PACK_LINEAR_WEIGHT_SCHEMA, sluice::pack_linear_weight);
  SLUICE_IMPLEMENT(SL_UNPACK_LINEAR_WEIGHT_SCHEMA, sluice::unpack_linear_weight);
  SLUICE_IMPLEMENT(SL_LOOKUP_LINEAR_WEIGHT_SCHEMA, sluice::lookup_linear_weight);
  SLUICE_IMPLEMENT(SL_PACK_CONV2D_WEIGHT_SCHEMA, sluice::pack_conv2d_weight);
  SLUICE_IMPLEMENT(SL_LINEAR_DYNAMIC_SCHEMA, sluice::linear_dynamic);
  SLUICE_IMPLEMENT(SL_CONV2D_DYNAMIC_SCHEMA, sluice::conv2d_dynamic);
}

SLUICE_ELSEWHERE(library) {
  SLUICE_REFUSE(SL_QUANTIZE_DYNAMIC_SCHEMA, sluice::quantize_dynamic, false);
  SLUICE_REFUSE(SL_PACK_LINEAR_WEIGHT_SCHEMA, sluice::pack_linear_weight, false);
  SLUICE_REFUSE(SL_UNPACK_LINEAR_WEIGHT_SCHEMA, sluice::unpack_linear_weight, false);
  SLUICE_REFUSE(SL_LOOKUP_LINEAR_WEIGHT_SCHEMA, sluice::lookup_linear_weight, false);
  SLUICE_REFUSE(SL_PACK_CONV2D_WEIGHT_SCHEMA, sluice::pack_conv2d_weight, false);
  SLUICE_REFUSE(SL_LINEAR_DYNAMIC_SCHEMA, sluice::linear_dynamic, false);
  SLUICE_REFUSE(SL_CONV2D_DYNAMIC_SCHEMA, sluice::conv2d_dynamic, false);
}

// Shim of quantize_recurrent: check shapes and dtypes, allocate, call C.
#include <sluice/quantize_recurrent.h>

#include <tuple>

#include "operator.h"
#include "quantize.h"

namespace sluice {
namespace {

// What both operators take; the LSTM's own are empty for a GRU.
struct Layer {
  Tensor x, h0;
  OptionalTensor c0;
  Tensor packed_ih, scale_ih, packed_hh, scale_hh;
  OptionalTensor packed_hr, scale_hr, bias_ih, bias_hh, batch_sizes;
  std::vector<int64_t> weight_bits, group_size;
  bool reverse;
  int64_t activation_bits, state_bits;
  double target_sqnr, outlier_ratio;
};

struct Results {
  Tensor out, hn;
  OptionalTensor cn;
  Tensor bits;
};

void check_like_x(const char *name, const Tensor &tensor, const Tensor &x, const std::vector<int64_t> &shape,
                  const char *meaning) {
  check_device(name, tensor);
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.scalar_type() == x.scalar_type();
  std::string sizes;
  for (size_t i = 0; i < shape.size(); ++i) {
    sizes += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
    if (fits && shape[i] >= 0) fits = tensor.size(static_cast<int64_t>(i)) == shape[i];
  }
  if (!fits)
    fail(std::string(name) + " is " + describe(tensor) + ", expected x's dtype and " + meaning + " = [" + sizes + "]");
}

void check_entries(const char *name, const std::vector<int64_t> &values, size_t matrices) {
  if (values.size() != matrices) {
    fail(std::string(name) + " has " + std::to_string(values.size()) + " numbers, expected " +
         std::to_string(matrices) + ", one for each weight");
  }
}

// steps, batch and rows of x, and where batch_sizes are.
Tensor attach_sequences(sl_recurrent_dynamic_args &args, const Layer &layer) {
  const Tensor &x = layer.x;
  check_values("x", x);
  if (!layer.batch_sizes) {
    if (x.dim() != 3) {
      fail("x is " + describe(x) + ", expected [steps, batch, inputs], or [rows, inputs] with batch_sizes");
    }
    args.steps = x.size(0), args.batch = x.size(1);
    if (__builtin_mul_overflow(args.steps, args.batch, &args.rows))
      fail("x is " + describe(x) + ", which is too large");
    return x;
  }
  if (x.dim() != 2) fail("x is " + describe(x) + ", expected [rows, inputs] with batch_sizes");
  const Tensor &sizes = *layer.batch_sizes;
  check_device("batch_sizes", sizes);
  if (sizes.scalar_type() != ScalarType::Long || sizes.dim() != 1) {
    fail("batch_sizes is " + describe(sizes) + ", expected int64 [steps]");
  }
  if (layer.h0.dim() != 2) fail("h0 is " + describe(layer.h0) + ", expected [batch, state size]");
  args.steps = sizes.size(0), args.batch = layer.h0.size(0), args.rows = x.size(0);
  Tensor dense = as_contiguous(sizes);
  args.batch_sizes = static_cast<decltype(args.batch_sizes)>(dense.const_data_ptr());
  return dense;
}

Results run_layer(const Layer &layer, int64_t gates, sl_status (*measure)(const sl_recurrent_dynamic_args *, size_t *),
                  sl_status (*call)(const sl_recurrent_dynamic_args *)) {
  sl_recurrent_dynamic_args args{};
  const Tensor &x = layer.x;
  Tensor sizes = attach_sequences(args, layer);
  args.project = layer.packed_hr.has_value();
  if (args.project != layer.scale_hr.has_value()) {
    fail(std::string(args.project ? "scale_hr is None, expected the scales of packed_hr"
                                  : "packed_hr is None, expected the weight of scale_hr"));
  }
  check_like_x("h0", layer.h0, x, {args.batch, -1}, "[batch, state size]");
  int64_t state = layer.h0.size(1), inputs = x.size(x.dim() - 1);
  if (layer.c0) {
    check_like_x("c0", *layer.c0, x, {args.batch, args.project ? -1 : state}, "[batch, hidden_size]");
  }
  args.hidden_size = layer.c0 ? layer.c0->size(1) : state;

  size_t matrices = args.project ? 3 : 2;
  check_entries("weight_bits", layer.weight_bits, matrices);
  check_entries("group_size", layer.group_size, matrices);
  int64_t outputs = 0;
  if (__builtin_mul_overflow(gates, args.hidden_size, &outputs))
    fail("h0 is " + describe(layer.h0) + ", which is too large");
  args.input = make_weight(outputs, inputs, 1, layer.weight_bits[0], layer.group_size[0]);
  attach_weight(args.input, layer.packed_ih, layer.scale_ih, {"packed_ih", "scale_ih"});
  args.hidden = make_weight(outputs, state, 1, layer.weight_bits[1], layer.group_size[1]);
  attach_weight(args.hidden, layer.packed_hh, layer.scale_hh, {"packed_hh", "scale_hh"});
  if (args.project) {
    args.projection = make_weight(state, args.hidden_size, 1, layer.weight_bits[2], layer.group_size[2]);
    attach_weight(args.projection, *layer.packed_hr, *layer.scale_hr, {"packed_hr", "scale_hr"});
  }
  OptionalTensor bias_ih = prepare_bias(layer.bias_ih, outputs, "bias_ih");
  OptionalTensor bias_hh = prepare_bias(layer.bias_hh, outputs, "bias_hh");
  args.input_bias = data_of(bias_ih), args.hidden_bias = data_of(bias_hh);

  args.dtype = dtype_of(x, "x"), args.reverse = layer.reverse;
  args.activation_bits = narrow("activation_bits", layer.activation_bits);
  args.state_bits = narrow("state_bits", layer.state_bits);
  args.target_sqnr = layer.target_sqnr, args.outlier_ratio = layer.outlier_ratio;
  sl_executor executor = torch_executor();
  args.executor = &executor;
  Tensor workspace = allocate_workspace(args, measure, x);
  Tensor dense_x = as_contiguous(x), h0 = as_contiguous(layer.h0);
  OptionalTensor c0 = layer.c0;
  if (c0) c0 = as_contiguous(*c0);
  std::vector<int64_t> shape =
      layer.batch_sizes ? std::vector<int64_t>{args.rows, state} : std::vector<int64_t>{args.steps, args.batch, state};
  Results results{empty(shape, x.scalar_type(), x), empty({args.batch, state}, x.scalar_type(), x), std::nullopt,
                  empty({static_cast<int64_t>(matrices), args.rows}, ScalarType::Char, x)};
  if (c0) {
    results.cn = empty({args.batch, args.hidden_size}, x.scalar_type(), x);
    args.c0 = c0->const_data_ptr(), args.cn = results.cn->mutable_data_ptr();
  }
  args.x = dense_x.const_data_ptr(), args.h0 = h0.const_data_ptr();
  args.out = results.out.mutable_data_ptr(), args.hn = results.hn.mutable_data_ptr();
  args.bits = static_cast<decltype(args.bits)>(results.bits.mutable_data_ptr());
  check_status(call(&args));
  return results;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_dynamic(
    Tensor x, Tensor h0, Tensor c0, Tensor packed_ih, Tensor scale_ih, Tensor packed_hh, Tensor scale_hh,
    OptionalTensor packed_hr, OptionalTensor scale_hr, OptionalTensor bias_ih, OptionalTensor bias_hh,
    OptionalTensor batch_sizes, std::vector<int64_t> weight_bits, std::vector<int64_t> group_size, bool reverse,
    int64_t activation_bits, int64_t state_bits, double target_sqnr, double outlier_ratio) {
  Layer layer{x,          h0,          c0,           packed_ih,   scale_ih,    packed_hh,  scale_hh, packed_hr,
              scale_hr,   bias_ih,     bias_hh,      batch_sizes, weight_bits, group_size, reverse,  activation_bits,
              state_bits, target_sqnr, outlier_ratio};
  Results results = run_layer(layer, 4, sl_lstm_dynamic_workspace_size, sl_lstm_dynamic);
  return {results.out, results.hn, results.cn.value_or(results.hn), results.bits};
}

std::tuple<Tensor, Tensor, Tensor> gru_dynamic(Tensor x, Tensor h0, Tensor packed_ih, Tensor scale_ih, Tensor packed_hh,
                                               Tensor scale_hh, OptionalTensor bias_ih, OptionalTensor bias_hh,
                                               OptionalTensor batch_sizes, std::vector<int64_t> weight_bits,
                                               std::vector<int64_t> group_size, bool reverse, int64_t activation_bits,
                                               int64_t state_bits, double target_sqnr, double outlier_ratio) {
  Layer layer{x,
              h0,
              std::nullopt,
              packed_ih,
              scale_ih,
              packed_hh,
              scale_hh,
              std::nullopt,
              std::nullopt,
              bias_ih,
              bias_hh,
              batch_sizes,
              weight_bits,
              group_size,
              reverse,
              activation_bits,
              state_bits,
              target_sqnr,
              outlier_ratio};
  Results results = run_layer(layer, 3, sl_gru_dynamic_workspace_size, sl_gru_dynamic);
  return {results.out, results.hn, results.bits};
}

}  // namespace sluice

STABLE_TORCH_LIBRARY_IMPL(sluice, CPU, library) {
  SLUICE_IMPLEMENT(SL_LSTM_DYNAMIC_SCHEMA, sluice::lstm_dynamic);
  SLUICE_IMPLEMENT(SL_GRU_DYNAMIC_SCHEMA, sluice::gru_dynamic);
}

SLUICE_ELSEWHERE(library) {
  SLUICE_REFUSE(SL_LSTM_DYNAMIC_SCHEMA, sluice::lstm_dynamic, false);
  SLUICE_REFUSE(SL_GRU_DYNAMIC_SCHEMA, sluice::gru_dynamic, false);
}

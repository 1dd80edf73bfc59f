/* Checks of the arguments of quantize. */
#include "quantize/validate.h"

#include <math.h>

#include "runtime/status.h"

/* Small enough for the products of all sizes below to stay within 64 bits where a sum of them is formed. */
static const int64_t largest_size = INT64_C(1) << 31, largest_count = INT64_C(1) << 46;

static sl_status check_size(const char *name, int64_t value, int64_t least) {
  SL_REQUIRE(value >= least, SL_INVALID_ARGUMENT, "%s is %lld, expected at least %lld", name, (long long)value,
             (long long)least);
  SL_REQUIRE(value <= largest_size, SL_OUT_OF_RANGE, "%s is %lld, expected at most 2^31", name, (long long)value);
  return SL_OK;
}

static sl_status check_count(const char *name, int64_t rows, int64_t columns) {
  SL_REQUIRE(rows == 0 || columns <= largest_count / rows, SL_OUT_OF_RANGE,
             "%s has %lld x %lld elements, expected at most 2^46", name, (long long)rows, (long long)columns);
  return SL_OK;
}

static sl_status check_pointer(const char *name, const void *data, bool empty) {
  SL_REQUIRE(data || empty, SL_INVALID_ARGUMENT, "%s is NULL, expected data", name);
  return SL_OK;
}

static sl_status check_executor(const sl_executor *executor) {
  SL_REQUIRE(!executor || (executor->parallel_for && executor->threads >= 1), SL_INVALID_ARGUMENT,
             "executor has threads = %d, expected at least 1 and a parallel_for", (int)executor->threads);
  return SL_OK;
}

sl_status sl_quantize_validate_dtype(const char *name, sl_dtype dtype) {
  SL_REQUIRE(dtype == SL_F32 || dtype == SL_BF16 || dtype == SL_F16, SL_UNSUPPORTED,
             "%s is %s, expected float32, bfloat16 or float16", name, sl_dtype_name(dtype));
  return SL_OK;
}

static sl_status check_choice(const char *name, int32_t bits, double target_sqnr) {
  SL_REQUIRE(bits == SL_BITS_BY_SQNR || bits == SL_BITS_BY_AMAX || bits == 4 || bits == 7 || bits == 8 || bits == 16,
             SL_INVALID_ARGUMENT, "%s is %d, expected 4, 7, 8, 16, 0 (by signal-to-noise ratio) or -1 (by amax)", name,
             (int)bits);
  SL_REQUIRE(bits != SL_BITS_BY_SQNR || (target_sqnr >= 0 && target_sqnr <= 200), SL_INVALID_ARGUMENT,
             "target_sqnr is %g, expected 0 to 200 dB", target_sqnr);
  return SL_OK;
}

static sl_status check_outlier_ratio(double ratio) {
  SL_REQUIRE(ratio >= 0 && isfinite(ratio), SL_INVALID_ARGUMENT,
             "outlier_ratio is %g, expected a number above 0, or 0 for no outlier channels", ratio);
  return SL_OK;
}

sl_status sl_quantize_validate_weight(const sl_quantized_weight *weight, bool data) {
  SL_REQUIRE(weight, SL_INVALID_ARGUMENT, "weight is NULL");
  SL_CHECK(check_size("groups", weight->groups, 1));
  SL_CHECK(check_size("out_features", weight->out_features, 0));
  SL_REQUIRE(weight->out_features % weight->groups == 0, SL_INVALID_ARGUMENT,
             "groups is %lld, expected a divisor of out_features, which is %lld", (long long)weight->groups,
             (long long)weight->out_features);
  SL_CHECK(check_size("in_features", weight->in_features, 0));
  SL_REQUIRE(weight->bits == 8 || weight->bits == 4, SL_INVALID_ARGUMENT, "bits of the weight is %d, expected 8 or 4",
             (int)weight->bits);
  SL_REQUIRE(weight->group_size >= 0 && weight->group_size % 32 == 0 && weight->group_size <= largest_size,
             SL_INVALID_ARGUMENT, "group_size is %lld, expected a multiple of 32, or 0 for one scale a channel",
             (long long)weight->group_size);
  /* Padding makes groups of one output channel 16 times as large, hence the margin. */
  SL_CHECK(check_count("weight", weight->out_features + 16, (weight->in_features + 8) * 16));
  SL_CHECK(check_count("weight", weight->groups * 16, (weight->in_features + 8) * 16));
  if (!data) return SL_OK;
  bool empty = weight->out_features == 0;
  SL_CHECK(check_pointer("packed", weight->packed, empty || weight->in_features == 0));
  return check_pointer("scale", weight->scale, empty);
}

sl_status sl_quantize_validate_quantize(const sl_quantize_dynamic_args *args, bool data) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_CHECK(check_size("rows", args->rows, 0));
  SL_CHECK(check_size("columns", args->columns, 0));
  SL_CHECK(check_count("x", args->rows, args->columns));
  SL_CHECK(sl_quantize_validate_dtype("x", args->dtype));
  SL_CHECK(check_choice("bits", args->activation_bits, args->target_sqnr));
  if (!data) return SL_OK;
  SL_CHECK(check_executor(args->executor));
  bool empty = args->rows == 0 || args->columns == 0;
  SL_CHECK(check_pointer("x", args->x, empty));
  SL_CHECK(check_pointer("q", args->q, empty));
  SL_CHECK(check_pointer("scale", args->scale, args->rows == 0 && args->per_token));
  return check_pointer("bits", args->bits, args->rows == 0 && args->per_token);
}

sl_status sl_quantize_validate_linear(const sl_linear_dynamic_args *args, bool data) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_CHECK(check_size("rows", args->rows, 0));
  SL_CHECK(sl_quantize_validate_weight(&args->weight, data));
  SL_REQUIRE(args->weight.groups == 1, SL_INVALID_ARGUMENT, "groups is %lld, expected 1 for a linear layer",
             (long long)args->weight.groups);
  SL_CHECK(check_count("x", args->rows, args->weight.in_features));
  SL_CHECK(check_count("out", args->rows, args->weight.out_features));
  SL_CHECK(sl_quantize_validate_dtype("x", args->dtype));
  SL_CHECK(check_choice("activation_bits", args->activation_bits, args->target_sqnr));
  SL_CHECK(check_outlier_ratio(args->outlier_ratio));
  SL_CHECK(check_executor(args->executor));
  if (!data) return SL_OK;
  SL_CHECK(check_pointer("x", args->x, args->rows == 0 || args->weight.in_features == 0));
  SL_CHECK(check_pointer("out", args->out, args->rows == 0 || args->weight.out_features == 0));
  return check_pointer("bits", args->bits, args->rows == 0);
}

static sl_status check_pair(const char *name, const int64_t pair[2], int64_t least) {
  SL_REQUIRE(pair[0] >= least && pair[1] >= least && pair[0] < largest_size && pair[1] < largest_size,
             SL_INVALID_ARGUMENT, "%s is (%lld, %lld), expected at least %lld", name, (long long)pair[0],
             (long long)pair[1], (long long)least);
  return SL_OK;
}

sl_status sl_quantize_validate_conv2d(const sl_conv2d_dynamic_args *args, bool data) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_CHECK(check_size("images", args->images, 0));
  SL_CHECK(check_size("channels", args->channels, 0));
  SL_CHECK(check_size("height", args->height, 0));
  SL_CHECK(check_size("width", args->width, 0));
  SL_CHECK(check_pair("kernel_size", args->kernel, 1));
  SL_CHECK(check_pair("stride", args->stride, 1));
  SL_CHECK(check_pair("padding", args->padding, 0));
  SL_CHECK(check_pair("dilation", args->dilation, 1));
  SL_CHECK(sl_quantize_validate_weight(&args->weight, data));
  SL_REQUIRE(args->channels % args->weight.groups == 0, SL_INVALID_ARGUMENT,
             "groups is %lld, expected a divisor of channels, which is %lld", (long long)args->weight.groups,
             (long long)args->channels);
  int64_t area, inputs;
  bool large = __builtin_mul_overflow(args->kernel[0], args->kernel[1], &area) ||
               __builtin_mul_overflow(area, args->channels / args->weight.groups, &inputs);
  SL_REQUIRE(
      !large && inputs == args->weight.in_features, SL_INVALID_ARGUMENT,
      "the weight has in_features %lld, expected kernel_height * kernel_width * channels / groups of kernel_size "
      "(%lld, %lld) and %lld / %lld channels",
      (long long)args->weight.in_features, (long long)args->kernel[0], (long long)args->kernel[1],
      (long long)args->channels, (long long)args->weight.groups);
  int64_t padded[2] = {args->height + 2 * args->padding[0], args->width + 2 * args->padding[1]};
  for (int i = 0; i < 2; ++i) {
    int64_t reach;
    bool far = __builtin_mul_overflow(args->dilation[i], args->kernel[i] - 1, &reach) || reach >= padded[i];
    SL_REQUIRE(!far, SL_INVALID_ARGUMENT,
               "%s of x is %lld with padding %lld, expected at least the kernel's %lld with dilation %lld",
               i ? "width" : "height", (long long)(i ? args->width : args->height), (long long)args->padding[i],
               (long long)args->kernel[i], (long long)args->dilation[i]);
  }
  SL_CHECK(check_count("padded image", padded[0], padded[1]));
  SL_CHECK(check_count("padded image", padded[0] * padded[1], args->channels + SL_QUANTIZE_DEPTH));
  SL_CHECK(check_count("x", args->images, padded[0] * padded[1] * args->channels));
  SL_CHECK(check_count("out", args->images, padded[0] * padded[1]));
  SL_CHECK(check_count("out", args->images * padded[0] * padded[1], args->weight.out_features));
  SL_CHECK(sl_quantize_validate_dtype("x", args->dtype));
  SL_CHECK(check_choice("activation_bits", args->activation_bits, args->target_sqnr));
  SL_CHECK(check_executor(args->executor));
  if (!data) return SL_OK;
  bool no_input = args->images == 0 || args->channels == 0;
  SL_CHECK(check_pointer("x", args->x, no_input || args->height == 0 || args->width == 0));
  SL_CHECK(check_pointer("out", args->out, args->images == 0 || args->weight.out_features == 0));
  return check_pointer("bits", args->bits, args->images == 0);
}

sl_status sl_quantize_validate_lookup(const sl_lookup_weight_args *args) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_CHECK(check_size("count", args->count, 0));
  SL_CHECK(sl_quantize_validate_weight(&args->weight, true));
  SL_REQUIRE(args->weight.groups == 1, SL_INVALID_ARGUMENT, "groups is %lld, expected 1 for a linear layer",
             (long long)args->weight.groups);
  SL_CHECK(check_count("values", args->count, args->weight.in_features));
  SL_CHECK(check_executor(args->executor));
  SL_CHECK(check_pointer("rows", args->rows, args->count == 0));
  SL_CHECK(check_pointer("values", args->values, args->count == 0 || args->weight.in_features == 0));
  for (int64_t i = 0; i < args->count; ++i) {
    SL_REQUIRE(args->rows[i] >= 0 && args->rows[i] < args->weight.out_features, SL_INVALID_ARGUMENT,
               "rows has %lld at %lld, expected at least 0 and less than out_features, which is %lld",
               (long long)args->rows[i], (long long)i, (long long)args->weight.out_features);
  }
  return SL_OK;
}

static sl_status check_matrix(const char *name, const sl_quantized_weight *weight, int64_t outputs, int64_t inputs,
                              bool data) {
  SL_CHECK(sl_quantize_validate_weight(weight, data));
  SL_REQUIRE(weight->groups == 1, SL_INVALID_ARGUMENT, "groups of the %s weight is %lld, expected 1", name,
             (long long)weight->groups);
  SL_REQUIRE(weight->out_features == outputs && weight->in_features == inputs, SL_INVALID_ARGUMENT,
             "the %s weight is [%lld, %lld], expected [%lld, %lld]", name, (long long)weight->out_features,
             (long long)weight->in_features, (long long)outputs, (long long)inputs);
  return SL_OK;
}

static sl_status check_batch_sizes(const sl_recurrent_dynamic_args *args) {
  int64_t most = args->batch, rows = 0;
  for (int64_t step = 0; step < args->steps; ++step) {
    int64_t size = args->batch_sizes[step];
    SL_REQUIRE(size >= 1 && size <= most, SL_INVALID_ARGUMENT,
               "batch_sizes[%lld] is %lld, expected at least 1 and at most %s, which is %lld", (long long)step,
               (long long)size, step ? "the one before" : "the batch of h0", (long long)most);
    most = size, rows += size;
  }
  SL_REQUIRE(rows == args->rows, SL_INVALID_ARGUMENT, "x has %lld rows, expected the sum of batch_sizes, %lld",
             (long long)args->rows, (long long)rows);
  return SL_OK;
}

sl_status sl_quantize_validate_recurrent(const sl_recurrent_dynamic_args *args, int gates, bool data) {
  SL_REQUIRE(args, SL_INVALID_ARGUMENT, "args is NULL");
  SL_CHECK(check_size("steps", args->steps, 0));
  SL_CHECK(check_size("batch", args->batch, 0));
  SL_CHECK(check_size("rows", args->rows, 0));
  SL_CHECK(check_size("hidden_size", args->hidden_size, 0));
  bool lstm = gates == 4;
  SL_REQUIRE(lstm || !args->project, SL_INVALID_ARGUMENT, "project is true, expected false for a GRU");
  int64_t outputs = gates * args->hidden_size;
  int64_t state = args->project ? args->projection.out_features : args->hidden_size;
  SL_CHECK(check_matrix("input", &args->input, outputs, args->input.in_features, data));
  SL_CHECK(check_matrix("hidden", &args->hidden, outputs, state, data));
  if (args->project) SL_CHECK(check_matrix("projection", &args->projection, state, args->hidden_size, data));
  int64_t columns = args->input.in_features > outputs ? args->input.in_features : outputs;
  SL_CHECK(check_count("x or its product", args->rows, columns));
  SL_CHECK(check_count("the state", args->batch, outputs));
  SL_CHECK(sl_quantize_validate_dtype("x", args->dtype));
  SL_CHECK(check_choice("activation_bits", args->activation_bits, args->target_sqnr));
  SL_CHECK(check_choice("state_bits", args->state_bits, args->target_sqnr));
  SL_CHECK(check_outlier_ratio(args->outlier_ratio));
  SL_CHECK(check_executor(args->executor));
  if (!data) return SL_OK;
  if (args->batch_sizes) {
    SL_CHECK(check_batch_sizes(args));
  } else {
    /* Neither is above 2^31, so that the product stays within 64 bits. */
    SL_REQUIRE(args->rows == args->steps * args->batch, SL_INVALID_ARGUMENT,
               "x has %lld rows, expected steps * batch, %lld * %lld", (long long)args->rows, (long long)args->steps,
               (long long)args->batch);
  }
  SL_CHECK(check_pointer("x", args->x, args->rows == 0 || args->input.in_features == 0));
  SL_CHECK(check_pointer("out", args->out, args->rows == 0 || state == 0));
  SL_CHECK(check_pointer("h0", args->h0, args->batch == 0 || state == 0));
  SL_CHECK(check_pointer("hn", args->hn, args->batch == 0 || state == 0));
  bool no_cell = !lstm || args->batch == 0 || args->hidden_size == 0;
  SL_CHECK(check_pointer("c0", args->c0, no_cell));
  SL_CHECK(check_pointer("cn", args->cn, no_cell));
  return check_pointer("bits", args->bits, args->rows == 0);
}

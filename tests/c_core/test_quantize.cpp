// quantize_dynamic and conv2d_dynamic on every tier against the reference, packed weights against cases worked by hand,
// and bad input.
#include "quantize_problem.h"

namespace sluice_test {
namespace {

double normal(Random &random) { return random.normal(); }

TEST(QuantizeWeight, IsPackedAsTheContractSays) {
  // One output channel, nine inputs: scale 1, so integers are the values.
  const float values[9] = {127, -1, 2, -3, 4, -5, 6, -7, 8};
  sl_quantized_weight weight{};
  weight.out_features = 1, weight.in_features = 9, weight.groups = 1, weight.bits = 8;
  int64_t bytes, groups, padded;
  ASSERT_EQ(sl_packed_weight_size(&weight, &bytes, &groups, &padded), SL_OK);
  EXPECT_EQ(bytes, 16 * 16);
  EXPECT_EQ(groups, 1);
  EXPECT_EQ(padded, 16);
  std::vector<int8_t> packed(static_cast<size_t>(bytes));
  std::vector<float> scale(16);
  ASSERT_EQ(sl_pack_weight(&weight, SL_F32, values, packed.data(), scale.data()), SL_OK);
  EXPECT_EQ(scale[0], 1);
  EXPECT_EQ(scale[1], 0);
  const int8_t first[4] = {127, 2, -1, -3};
  EXPECT_EQ(std::memcmp(packed.data(), first, 4), 0);
  EXPECT_EQ(packed[64], 4);
  EXPECT_EQ(packed[128], 8);
  EXPECT_EQ(packed[4], 0);
  EXPECT_EQ(packed[129], 0);
}

TEST(QuantizeWeight, FourBitsAreHalvesOfBytes) {
  const float values[8] = {7, -7, 1, 0, -1, 2, 3, -4};
  sl_quantized_weight weight{};
  weight.out_features = 1, weight.in_features = 8, weight.groups = 1, weight.bits = 4;
  std::vector<uint8_t> packed(64);
  std::vector<float> scale(16);
  ASSERT_EQ(sl_pack_weight(&weight, SL_F32, values, packed.data(), scale.data()), SL_OK);
  EXPECT_EQ(scale[0], 1);
  const uint8_t first[5] = {15 | 7 << 4, 1 | 10 << 4, 9 | 11 << 4, 8 | 4 << 4, 0x88};
  EXPECT_EQ(std::memcmp(packed.data(), first, 5), 0);
}

TEST(QuantizeWeight, ErrorsAreWithinHalfAStep) {
  Random random(1);
  Weight weight(19, 75, 8, 32, 1, normal, random);
  Random again(1);
  std::vector<float> values(19 * 75);
  ASSERT_EQ(sl_unpack_weight(&weight.sizes, values.data()), SL_OK);
  for (int64_t i = 0; i < 19 * 75; ++i) {
    float wanted = static_cast<float>(again.normal());
    ASSERT_NEAR(values[static_cast<size_t>(i)], wanted, weight.sizes.scale[i % 75 / 32 * 32 + i / 75] * 0.5001) << i;
  }
}

class Quantize : public testing::TestWithParam<sl_isa> {
 protected:
  IsaCap cap_{GetParam()};
};

TEST_P(Quantize, IntegersAreThoseOfTheReference) {
  uint64_t seed = 1;
  for (int64_t columns : {0, 1, 7, 16, 31, 100, 1000}) {
    for (int bits : {4, 7, 8, 16, 0, -1}) {
      for (bool per_token : {true, false}) {
        for (sl_dtype dtype : {SL_F32, SL_BF16, SL_F16}) {
          Random random(++seed);
          int64_t rows = static_cast<int64_t>(seed % 12);
          size_t size = bits > 0 && bits <= 8 ? 1 : 2, scales = per_token ? static_cast<size_t>(rows) : 1;
          double spread = seed % 2 ? 1 : 0.01, bad = seed % 5 == 0 ? NAN : 1;
          Fill next = [=](Random &r) { return r.normal(spread) * (r.chance(0.002) ? 20 * bad : 1); };
          GuardedBuffer x = make_values(dtype, rows * columns, next, random, seed % 3 == 0);
          GuardedBuffer q[2], scale[2], chosen[2];
          for (int i = 0; i < 2; ++i) {
            q[i] = GuardedBuffer(static_cast<size_t>(rows * columns) * size, size);
            scale[i] = GuardedBuffer(scales * 4), chosen[i] = GuardedBuffer(scales, 1);
            sl_quantize_dynamic_args args{};
            args.rows = rows, args.columns = columns, args.dtype = dtype, args.x = x.data();
            args.activation_bits = bits, args.target_sqnr = 35, args.per_token = per_token, args.q = q[i].data();
            args.scale = static_cast<float *>(scale[i].data());
            args.bits = static_cast<int8_t *>(chosen[i].data());
            auto call = i ? sl_quantize_dynamic : sl_quantize_dynamic_reference;
            ASSERT_EQ(run_guarded(args, sl_quantize_dynamic_workspace_size, call), SL_OK) << sl_last_error();
          }
          ASSERT_EQ(std::memcmp(q[0].data(), q[1].data(), q[0].size()), 0) << rows << " x " << columns << " " << bits;
          ASSERT_EQ(std::memcmp(chosen[0].data(), chosen[1].data(), scales), 0);
          for (size_t i = 0; i < scales; ++i) {
            float wanted = static_cast<float *>(scale[0].data())[i], got = static_cast<float *>(scale[1].data())[i];
            ASSERT_TRUE(wanted == got || (std::isnan(wanted) && std::isnan(got))) << wanted << " " << got;
          }
          ASSERT_TRUE(q[1].intact() && scale[1].intact() && chosen[1].intact() && x.intact());
        }
      }
    }
  }
}

struct Convolution {
  int64_t images, channels, height, width, outputs, kernel[2], stride[2], padding[2], dilation[2], groups;
};

const std::vector<Convolution> kConvolutions = {
    {2, 3, 7, 6, 16, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},    {1, 16, 5, 5, 20, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1},
    {1, 8, 9, 8, 33, {1, 1}, {2, 3}, {0, 1}, {1, 1}, 1},    {2, 1, 60, 1, 18, {16, 1}, {4, 1}, {6, 0}, {1, 1}, 1},
    {1, 5, 40, 1, 9, {8, 1}, {1, 1}, {3, 0}, {1, 1}, 1},    {1, 12, 8, 9, 6, {3, 2}, {2, 1}, {2, 0}, {1, 2}, 3},
    {1, 7, 6, 6, 7, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 7},     {1, 6, 4, 3, 5, {2, 3}, {1, 1}, {0, 0}, {1, 1}, 1},
    {3, 64, 10, 11, 17, {3, 3}, {1, 2}, {1, 1}, {2, 1}, 1}, {1, 4, 1, 1, 6, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 2},
    {1, 70, 4, 3, 34, {1, 3}, {1, 1}, {0, 0}, {1, 1}, 1},   {0, 3, 4, 4, 5, {3, 3}, {1, 1}, {0, 0}, {1, 1}, 1},
};

TEST_P(Quantize, ConvolutionsAreThoseOfTheReference) {
  uint64_t seed = 50;
  for (const Convolution &shape : kConvolutions) {
    for (int variant = 0; variant < 8; ++variant) {
      Random random(++seed);
      int weight_bits = variant % 2 ? 4 : 8, bits = std::vector<int>{8, 16, 0, 4}[static_cast<size_t>(variant / 2)];
      sl_dtype dtype = seed % 4 == 0 ? SL_F16 : SL_F32;
      int64_t inputs = shape.kernel[0] * shape.kernel[1] * shape.channels / shape.groups;
      Weight weight(shape.outputs, inputs, weight_bits, seed % 3 ? 0 : 32, shape.groups, normal, random);
      int64_t elements = shape.images * shape.channels * shape.height * shape.width;
      int64_t at = 0, bad = seed % 5 == 0 ? elements - 1 : -1;
      Fill next = [=](Random &r) mutable { return at++ == bad ? static_cast<double>(INFINITY) : r.normal(); };
      GuardedBuffer x = make_values(dtype, elements, next, random, variant % 2), out[2], chosen[2];
      GuardedBuffer bias = make_values(SL_F32, shape.outputs, normal, random, true);
      sl_conv2d_dynamic_args args{};
      args.images = shape.images, args.channels = shape.channels, args.height = shape.height, args.width = shape.width;
      for (int i = 0; i < 2; ++i) {
        args.kernel[i] = shape.kernel[i], args.stride[i] = shape.stride[i];
        args.padding[i] = shape.padding[i], args.dilation[i] = shape.dilation[i];
      }
      args.weight = weight.sizes, args.dtype = dtype, args.x = x.data();
      args.channels_last = variant / 2 % 2, args.bias = static_cast<const float *>(bias.data());
      args.activation_bits = bits, args.target_sqnr = 30;
      ThreadExecutor executor(3);
      args.executor = executor.get();
      int64_t size[2];
      ASSERT_EQ(sl_conv2d_dynamic_out_size(&args, size), SL_OK) << sl_last_error();
      int64_t count = shape.images * shape.outputs * size[0] * size[1];
      for (int i = 0; i < 2; ++i) {
        out[i] = GuardedBuffer(static_cast<size_t>(count) * sl_dtype_size(dtype), sl_dtype_size(dtype));
        chosen[i] = GuardedBuffer(static_cast<size_t>(shape.images));
        args.out = out[i].data(), args.bits = static_cast<int8_t *>(chosen[i].data());
        auto call = i ? sl_conv2d_dynamic : sl_conv2d_dynamic_reference;
        ASSERT_EQ(run_guarded(args, sl_conv2d_dynamic_workspace_size, call), SL_OK) << sl_last_error();
      }
      std::string where =
          "convolution " + std::to_string(&shape - kConvolutions.data()) + "." + std::to_string(variant);
      ASSERT_EQ(std::memcmp(chosen[0].data(), chosen[1].data(), chosen[0].size()), 0) << where;
      expect_close(dtype, out[1], out[0], count, where);
      ASSERT_TRUE(out[1].intact() && chosen[1].intact() && x.intact() && bias.intact() && weight.intact());
    }
  }
}

TEST_P(Quantize, ThePeakLoopDoesAtLeastWhatIsAsked) {
  EXPECT_EQ(sl_quantize_run_peak(0), 0);
  EXPECT_GE(sl_quantize_run_peak(100000), 100000);
  EXPECT_STREQ(sl_quantize_kernel_name(), sl_isa_name(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Tiers, Quantize, testing::ValuesIn(quantize_tiers()),
                         [](const auto &tier) { return std::string(sl_isa_name(tier.param)); });

void expect_error(sl_status status, sl_status wanted, const std::string &text) {
  EXPECT_EQ(status, wanted);
  EXPECT_NE(std::string(sl_last_error()).find(text), std::string::npos) << sl_last_error() << "\nexpected: " << text;
}

TEST(QuantizeErrors, NameTheArgument) {
  Random random(3);
  Weight weight(5, 6, 8, 0, 1, normal, random);
  float x[12] = {0}, out[10];
  int8_t bits[2];
  sl_linear_dynamic_args good{};
  good.rows = 2, good.weight = weight.sizes, good.x = x, good.out = out, good.bits = bits;
  good.activation_bits = 8, good.per_token = true;
  auto linear = [&](auto change, sl_status wanted, const char *text) {
    sl_linear_dynamic_args args = good;
    change(args);
    size_t bytes;
    if (sl_linear_dynamic_workspace_size(&args, &bytes) == SL_OK) {
      GuardedBuffer workspace(bytes);
      if (!args.workspace_size) args.workspace = workspace.data(), args.workspace_size = bytes;
      expect_error(sl_linear_dynamic(&args), wanted, text);
    } else {
      expect_error(sl_linear_dynamic(&args), wanted, text);
    }
  };
  using Args = sl_linear_dynamic_args &;
  linear([](Args a) { a.rows = -1; }, SL_INVALID_ARGUMENT, "rows is -1, expected at least 0");
  linear([](Args a) { a.weight.bits = 5; }, SL_INVALID_ARGUMENT, "bits of the weight is 5, expected 8 or 4");
  linear([](Args a) { a.weight.group_size = 48; }, SL_INVALID_ARGUMENT, "group_size is 48, expected a multiple of 32");
  linear([](Args a) { a.weight.groups = 5; }, SL_INVALID_ARGUMENT, "groups is 5, expected 1");
  linear([](Args a) { a.activation_bits = 6; }, SL_INVALID_ARGUMENT, "activation_bits is 6, expected 4, 7, 8, 16");
  linear([](Args a) { a.activation_bits = 0, a.target_sqnr = NAN; }, SL_INVALID_ARGUMENT, "target_sqnr is nan");
  linear([](Args a) { a.outlier_ratio = -1; }, SL_INVALID_ARGUMENT, "outlier_ratio is -1");
  linear([](Args a) { a.dtype = SL_F64; }, SL_UNSUPPORTED, "x is float64, expected float32, bfloat16 or float16");
  linear([](Args a) { a.x = nullptr; }, SL_INVALID_ARGUMENT, "x is NULL");
  linear([](Args a) { a.weight.packed = nullptr; }, SL_INVALID_ARGUMENT, "packed is NULL");
  linear([](Args a) { a.rows = INT64_C(1) << 40; }, SL_OUT_OF_RANGE, "rows is 1099511627776");
  linear([](Args a) { a.workspace = a.out, a.workspace_size = 1; }, SL_OUT_OF_MEMORY, "workspace_size is 1");

  const float bad[6] = {0, 0, 0, 0, INFINITY, 0};
  sl_quantized_weight sizes{};
  sizes.out_features = 2, sizes.in_features = 3, sizes.groups = 1, sizes.bits = 8;
  std::vector<uint8_t> packed(512);
  float scale[16];
  expect_error(sl_pack_weight(&sizes, SL_F32, bad, packed.data(), scale), SL_INVALID_ARGUMENT,
               "weight has inf at output 1, input 1, expected finite values");

  sl_conv2d_dynamic_args conv{};
  conv.images = 1, conv.channels = 6, conv.height = 1, conv.width = 1, conv.weight = weight.sizes;
  for (int i = 0; i < 2; ++i) conv.kernel[i] = conv.stride[i] = conv.dilation[i] = 1;
  int64_t size[2];
  ASSERT_EQ(sl_conv2d_dynamic_out_size(&conv, size), SL_OK) << sl_last_error();
  conv.stride[1] = 0;
  expect_error(sl_conv2d_dynamic_out_size(&conv, size), SL_INVALID_ARGUMENT, "stride is (1, 0), expected at least 1");
  conv.stride[1] = 1, conv.kernel[0] = 3, conv.channels = 2;
  expect_error(sl_conv2d_dynamic_out_size(&conv, size), SL_INVALID_ARGUMENT, "height of x is 1 with padding 0");
  conv.channels = 3;
  expect_error(sl_conv2d_dynamic_out_size(&conv, size), SL_INVALID_ARGUMENT, "the weight has in_features 6");
}

}  // namespace
}  // namespace sluice_test

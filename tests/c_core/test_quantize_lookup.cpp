// lookup_linear_weight: rows of a packed weight, against the reference, against all of it unpacked, and by hand.
#include "quantize_problem.h"

namespace sluice_test {
namespace {

double normal(Random &random) { return random.normal(); }

sl_lookup_weight_args make_args(const Weight &weight, const std::vector<int64_t> &rows, GuardedBuffer &values) {
  values = GuardedBuffer(rows.size() * static_cast<size_t>(weight.sizes.in_features) * sizeof(float), sizeof(float));
  sl_lookup_weight_args args{};
  args.weight = weight.sizes, args.count = static_cast<int64_t>(rows.size()), args.rows = rows.data();
  args.values = static_cast<float *>(values.data());
  return args;
}

TEST(QuantizeLookup, IsTheReferenceAndTheUnpackedWeight) {
  uint64_t seed = 1;
  for (int64_t inputs : {1, 5, 8, 33, 70, 515}) {
    for (int64_t outputs : {1, 16, 17, 50}) {
      for (int bits : {8, 4}) {
        Random random(++seed);
        Weight weight(outputs, inputs, bits, seed % 2 ? 32 : 0, 1, normal, random);
        std::vector<int64_t> rows;
        for (int64_t i = 0; i < static_cast<int64_t>(seed % 40); ++i) rows.push_back(i * 7 % outputs);
        GuardedBuffer got, wanted, all(static_cast<size_t>(outputs * inputs) * sizeof(float));
        ThreadExecutor executor(3);
        sl_lookup_weight_args args = make_args(weight, rows, wanted);
        ASSERT_EQ(sl_lookup_weight_reference(&args), SL_OK) << sl_last_error();
        args = make_args(weight, rows, got);
        args.executor = executor.get();
        ASSERT_EQ(sl_lookup_weight(&args), SL_OK) << sl_last_error();
        ASSERT_EQ(sl_unpack_weight(&weight.sizes, static_cast<float *>(all.data())), SL_OK) << sl_last_error();
        for (size_t i = 0; i < rows.size(); ++i) {
          for (int64_t k = 0; k < inputs; ++k) {
            int64_t at = static_cast<int64_t>(i) * inputs + k;
            float value = static_cast<float *>(got.data())[at];
            ASSERT_EQ(value, static_cast<float *>(wanted.data())[at]) << "row " << i << " input " << k;
            ASSERT_EQ(value, static_cast<float *>(all.data())[rows[i] * inputs + k]) << "row " << i << " input " << k;
          }
        }
        ASSERT_TRUE(got.intact() && wanted.intact() && all.intact() && weight.intact());
      }
    }
  }
}

TEST(QuantizeLookup, ManyRowsOnSeveralThreads) {
  Random random(5);
  Weight weight(40, 600, 8, 0, 1, normal, random);
  std::vector<int64_t> rows(300);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int64_t>(i * 11 % 40);
  GuardedBuffer got, wanted;
  ThreadExecutor executor(4);
  sl_lookup_weight_args args = make_args(weight, rows, wanted);
  ASSERT_EQ(sl_lookup_weight_reference(&args), SL_OK);
  args = make_args(weight, rows, got);
  args.executor = executor.get();
  ASSERT_EQ(sl_lookup_weight(&args), SL_OK);
  EXPECT_EQ(std::memcmp(got.data(), wanted.data(), rows.size() * 600 * sizeof(float)), 0);
  EXPECT_TRUE(got.intact());
}

TEST(QuantizeLookup, ByHand) {
  const float values[2][3] = {{127, -1, 64}, {0, 0, 0}};
  sl_quantized_weight sizes{};
  sizes.out_features = 2, sizes.in_features = 3, sizes.groups = 1, sizes.bits = 8;
  std::vector<uint8_t> packed(128);
  float scale[16], out[9];
  ASSERT_EQ(sl_pack_weight(&sizes, SL_F32, values, packed.data(), scale), SL_OK) << sl_last_error();
  sizes.packed = packed.data(), sizes.scale = scale;
  const int64_t rows[3] = {1, 0, 0};
  sl_lookup_weight_args args{};
  args.weight = sizes, args.count = 3, args.rows = rows, args.values = out;
  ASSERT_EQ(sl_lookup_weight(&args), SL_OK) << sl_last_error();
  const float wanted[9] = {0, 0, 0, 127, -1, 64, 127, -1, 64};
  for (int i = 0; i < 9; ++i) EXPECT_EQ(out[i], wanted[i]) << i;
}

TEST(QuantizeLookup, ErrorsNameTheArgument) {
  Random random(3);
  Weight weight(5, 6, 8, 0, 1, normal, random);
  const std::vector<int64_t> rows = {0, 4};
  GuardedBuffer values;
  const sl_lookup_weight_args good = make_args(weight, rows, values);
  auto refused = [&](auto change, const char *text) {
    sl_lookup_weight_args args = good;
    change(args);
    for (auto call : {sl_lookup_weight, sl_lookup_weight_reference}) {
      EXPECT_NE(call(&args), SL_OK);
      EXPECT_NE(std::string(sl_last_error()).find(text), std::string::npos) << sl_last_error();
    }
  };
  using Args = sl_lookup_weight_args &;
  const int64_t high[2] = {0, 5}, low[2] = {-1, 0};
  refused([&](Args a) { a.rows = high; },
          "rows has 5 at 1, expected at least 0 and less than out_features, which is 5");
  refused([&](Args a) { a.rows = low; }, "rows has -1 at 0");
  refused([](Args a) { a.rows = nullptr; }, "rows is NULL");
  refused([](Args a) { a.values = nullptr; }, "values is NULL");
  refused([](Args a) { a.count = -1; }, "count is -1, expected at least 0");
  refused([](Args a) { a.weight.groups = 5; }, "groups is 5, expected 1");
  refused([](Args a) { a.weight.packed = nullptr; }, "packed is NULL");
  EXPECT_NE(sl_lookup_weight(nullptr), SL_OK);
  EXPECT_TRUE(values.intact());
}

}  // namespace
}  // namespace sluice_test

// accumulate by its contract: hand-worked cases, what rounding may cost, stochastic rounding, and the same bits from
// any number of threads.
#include <gtest/gtest.h>

#include <numeric>

#include <sluice/accumulate.h>

#include "support.h"

extern "C" {
#include "accumulate/kernel.h"
}

namespace sluice_test {
namespace {

// An accumulator and the calls on it, run by the public functions.
class Accumulator {
 public:
  Accumulator(sl_dtype dtype, int64_t count, const sl_executor *executor = nullptr)
      : memory_(static_cast<size_t>(count) * sl_dtype_size(dtype)),
        exponents_(static_cast<size_t>(sl_count_blocks(count)), 0) {
    args.count = count, args.dtype = dtype, args.accumulator = memory_.data(), args.executor = executor;
    args.exponents = dtype == SL_F16 ? exponents_.data() : nullptr;
    args.grad_scale = 1, args.scale = 1, args.overwrite = true, args.stats = &stats;
    size_t bytes = 0;
    EXPECT_EQ(sl_accumulate_workspace_size(count, &bytes), SL_OK);
    workspace_ = GuardedBuffer(bytes);
    args.workspace = workspace_.data(), args.workspace_size = bytes;
  }
  void add(const std::vector<float> &grad) {
    args.grad = grad.data(), args.grad_dtype = SL_F32;
    ASSERT_EQ(sl_accumulate(&args), SL_OK) << sl_last_error();
    args.overwrite = false;
  }
  std::vector<float> read(double scale = 1) {
    std::vector<float> out(static_cast<size_t>(args.count));
    args.out = out.data(), args.out_dtype = SL_F32, args.scale = scale;
    EXPECT_EQ(sl_read_accumulator(&args), SL_OK) << sl_last_error();
    return out;
  }
  const std::vector<int8_t> &exponents() const { return exponents_; }
  GuardedBuffer &memory() { return memory_; }
  bool intact() const { return memory_.intact() && workspace_.intact(); }

  sl_accumulate_args args{};
  sl_accumulate_stats stats{};

 private:
  GuardedBuffer memory_, workspace_;
  std::vector<int8_t> exponents_;
};

std::vector<float> normal_values(int64_t count, double deviation, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (float &value : values) value = static_cast<float>(random.normal(deviation));
  return values;
}

double relative_error(const std::vector<float> &got, const std::vector<double> &expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

TEST(Accumulate, Float32IsAnOrdinarySumAndMeasuresTheGradient) {
  Accumulator sum(SL_F32, 3);
  sum.args.grad_scale = 2;
  sum.add({1, -2, 0.5f});
  EXPECT_EQ(sum.stats.grad_sumsq, 5.25);
  EXPECT_EQ(sum.stats.grad_amax, 2);
  EXPECT_EQ(sum.stats.sum_sumsq, 21);
  sum.add({3, 3, INFINITY});
  EXPECT_EQ(sum.read(0.5), (std::vector<float>{4, 1, INFINITY}));
  EXPECT_EQ(sum.stats.grad_sumsq, 17);  // of what was read
  EXPECT_EQ(sum.stats.grad_nonfinite, 1);
}

TEST(Accumulate, AFloat16BlockIsScaledByItsLargest) {
  std::vector<float> grad(2048, 0.0f);
  grad[7] = 3e-9f, grad[1024] = 5.0f, grad[2047] = -1.0f;
  Accumulator sum(SL_F16, 2048);
  sum.add(grad);
  // 3e-9 is in [2^-29, 2^-28), 5 in [2^2, 2^3): both come to lie in [2^14, 2^15).
  EXPECT_EQ(sum.exponents(), (std::vector<int8_t>{-29 - 14, 2 - 14}));
  EXPECT_NEAR(sum.read()[7], 3e-9, 3e-9 / 2048);
  EXPECT_EQ(sum.read()[1024], 5.0f);
  EXPECT_EQ(sum.read()[2047], -1.0f);
}

TEST(Accumulate, NothingSaturatesAndNothingVanishes) {
  for (float size : {1e-45f, 1e-38f, 1e-30f, 1e-8f, 1.0f, 7e4f, 1e20f, 3.4e38f}) {
    Accumulator sum(SL_F16, 1000);
    sum.add(std::vector<float>(1000, size));
    EXPECT_EQ(sum.stats.grad_nonfinite, 0);
    for (float value : sum.read()) ASSERT_NEAR(value / size, 1, 1.0 / 2048) << size;
    EXPECT_NEAR(sum.stats.grad_sumsq / (1000.0 * size * size), 1, 1e-2) << size;
  }
}

TEST(Accumulate, WhatGoesToFloat16IsReportedWithItsError) {
  std::vector<float> grad = normal_values(5000, 1e-6, 1);
  Accumulator sum(SL_F16, 5000);
  sum.add(grad);
  std::vector<double> expected(grad.begin(), grad.end());
  double reported = std::sqrt(sum.stats.error_sumsq / sum.stats.sum_sumsq);
  EXPECT_NEAR(relative_error(sum.read(), expected) / reported, 1, 1e-3);
  EXPECT_LT(reported, 1.0 / 4096);
  EXPECT_EQ(sum.stats.underflow, 0);
}

TEST(Accumulate, ElementsBelowTheNormalRangeAreCounted) {
  std::vector<float> grad(100, 0.0f);
  grad[0] = 1;
  grad[1] = 0x1p-28f;    // scaled to 2^-14: the smallest normal number
  grad[2] = 0x1.fp-29f;  // just below
  grad[3] = 1e-20f;      // flushed to 0
  Accumulator sum(SL_F16, 100);
  sum.add(grad);
  EXPECT_EQ(sum.stats.underflow, 2);
  EXPECT_EQ(sum.read()[1], 0x1p-28f);
  EXPECT_EQ(sum.read()[3], 0.0f);
}

TEST(Accumulate, StochasticRoundingIsRightOnAverage) {
  // 2000 gradients of 1 + 1/3 ulp: rounding to nearest loses the third each time, on average nothing is lost.
  const int64_t count = 4096;
  const float ulp = 0x1p-10f;
  for (bool stochastic : {false, true}) {
    double mean = 0;
    for (uint64_t seed = 0; seed < 8; ++seed) {
      Accumulator sum(SL_F16, count);
      sum.args.stochastic = stochastic, sum.args.seed = seed;
      sum.add(std::vector<float>(count, 1 + ulp / 3));
      std::vector<float> values = sum.read();
      mean += std::accumulate(values.begin(), values.end(), 0.0) / count / 8;
    }
    if (stochastic)
      EXPECT_NEAR(mean, 1 + ulp / 3, ulp * 0.02);  // 32768 draws: standard error .0026
    else
      EXPECT_EQ(mean, 1);
  }
}

TEST(Accumulate, StochasticRoundingIsRightBelowTheNormalRangeToo) {
  const int64_t count = 1024;
  double mean = 0;
  for (uint64_t seed = 0; seed < 64; ++seed) {
    std::vector<float> grad(count, 0x1p-38f * 0.3f);  // .3 of the smallest number that float16 has beside 1
    grad[0] = 1;
    Accumulator sum(SL_F16, count);
    sum.args.stochastic = true, sum.args.seed = seed;
    sum.add(grad);
    std::vector<float> values = sum.read();
    mean += std::accumulate(values.begin() + 1, values.end(), 0.0) / (count - 1) / 64;
  }
  EXPECT_NEAR(mean, 0x1p-38 * 0.3, 0x1p-38 * 0.01);
}

TEST(Accumulate, SmallGradientsAreNotSwampedByALargeSum) {
  // 1 + 512 * 2^-12 = 1.125, but to nearest every single 2^-12 is lost beside 1.
  const int64_t count = 2048;
  for (bool stochastic : {false, true}) {
    Accumulator sum(SL_F16, count);
    sum.args.stochastic = stochastic;
    sum.add(std::vector<float>(count, 1));
    for (uint64_t step = 0; step < 512; ++step) {
      sum.args.seed = step;
      sum.add(std::vector<float>(count, 0x1p-12f));
    }
    std::vector<float> values = sum.read();
    double mean = std::accumulate(values.begin(), values.end(), 0.0) / count;
    if (stochastic)
      EXPECT_NEAR(mean, 1.125, 1e-3);
    else
      EXPECT_EQ(mean, 1);
  }
}

TEST(Accumulate, RandomBitsAreEvenlySpreadAndDifferByPositionAndSeed) {
  // x + r cut to 13 bits less shows r: with x = 1 + k ulp/8192, the element is rounded up when r >= 8192 - k.
  const int64_t count = 65536;
  auto rounded_up = [&](uint64_t seed, int k) {
    Accumulator sum(SL_F16, count);
    sum.args.stochastic = true, sum.args.seed = seed;
    sum.add(std::vector<float>(count, 1 + 0x1p-10f * static_cast<float>(k) / 8192));
    std::vector<float> values = sum.read();
    std::vector<bool> up;
    for (float value : values) up.push_back(value > 1);
    return up;
  };
  for (int k : {1024, 4096, 7168}) {
    std::vector<bool> first = rounded_up(1, k), second = rounded_up(2, k);
    double p = k / 8192.0, both = 0, next = 0, far = 0;
    double share = static_cast<double>(std::count(first.begin(), first.end(), true)) / count;
    EXPECT_NEAR(share, p, 0.01) << k;
    for (int64_t i = 0; i + 1024 < count; ++i) {
      size_t at = static_cast<size_t>(i);
      both += first[at] && second[at], next += first[at] && first[at + 1], far += first[at] && first[at + 1024];
    }
    for (double joint : {both, next, far}) EXPECT_NEAR(joint / (count - 1024), p * p, 0.01) << k;
  }
}

TEST(Accumulate, AWindowInFloat16IsAsGoodAsItsReportsSay) {
  const int64_t count = 20000;
  std::vector<double> exact(count, 0.0);
  Accumulator sum(SL_F16, count);
  sum.args.stochastic = true;
  double error = 0;
  for (uint64_t step = 0; step < 16; ++step) {
    std::vector<float> grad = normal_values(count, 1e-7, step);
    for (int64_t i = 0; i < count; ++i) exact[static_cast<size_t>(i)] += grad[static_cast<size_t>(i)];
    sum.args.seed = step;
    sum.add(grad);
    error += sum.stats.error_sumsq;
  }
  double expected = std::sqrt(error / sum.stats.sum_sumsq);
  EXPECT_NEAR(relative_error(sum.read(), exact) / expected, 1, 0.05);
  EXPECT_LT(expected, 1.5e-3);
}

TEST(Accumulate, PromotionToFloat32LosesNothing) {
  for (double deviation : {1e-44, 1e-38, 1e-6, 1e30}) {
    std::vector<float> grad = normal_values(3000, deviation, 3);
    Accumulator half(SL_F16, 3000), single(SL_F32, 3000);
    half.add(grad);
    std::vector<float> promoted = half.read();
    single.add(promoted);
    half.add(promoted);  // doubles what it holds: exact
    single.add(promoted);
    EXPECT_EQ(half.read(), single.read()) << deviation;
  }
}

TEST(Accumulate, ValuesThatAreNotFiniteStayAndSpoilNothingElse) {
  std::vector<float> grad = normal_values(3000, 1, 4);
  grad[5] = NAN, grad[1500] = -INFINITY;
  Accumulator sum(SL_F16, 3000);
  sum.args.stochastic = true;
  sum.add(grad);
  EXPECT_EQ(sum.stats.grad_nonfinite, 2);
  EXPECT_TRUE(std::isfinite(sum.stats.grad_sumsq));
  EXPECT_EQ(sum.stats.sum_sumsq, INFINITY);
  std::vector<float> values = sum.read();
  EXPECT_TRUE(std::isnan(values[5]));
  EXPECT_EQ(values[1500], -INFINITY);
  for (size_t i = 0; i < values.size(); ++i) {
    if (i == 5 || i == 1500) continue;
    ASSERT_NEAR(values[i], grad[i], std::fabs(grad[i]) / 1024 + 1e-8);
  }
}

TEST(Accumulate, ASumThatOverflowsIsSeen) {
  for (sl_dtype dtype : {SL_F32, SL_F16}) {
    Accumulator sum(dtype, 4);
    sum.add({3e38f, 1, 1, 1});
    sum.add({3e38f, 1, 1, 1});
    EXPECT_EQ(sum.stats.grad_nonfinite, 0);
    EXPECT_EQ(sum.stats.sum_sumsq, INFINITY);
    sum.read();
    EXPECT_EQ(sum.stats.grad_nonfinite, 1);
  }
}

TEST(Accumulate, SumsOfSquaresHoldForEveryMagnitude) {
  for (float size : {1e-44f, 1e-30f, 1e-15f, 1.0f, 1e15f, 1e30f}) {
    for (int64_t count : {1, 100, 5000}) {
      std::vector<float> grad(static_cast<size_t>(count), size);
      Accumulator sum(SL_F32, count);
      sum.add(grad);
      double expected = static_cast<double>(size) * size * static_cast<double>(count);
      EXPECT_NEAR(sum.stats.grad_sumsq / expected, 1, 1e-6) << size;
      EXPECT_NEAR(sum.stats.sum_sumsq / expected, 1, 1e-6) << size;
    }
  }
}

TEST(Accumulate, TheSameBitsFromAnyNumberOfThreads) {
  const int64_t count = 400000;  // seven tasks
  std::vector<float> grad = normal_values(count, 1e-3, 5);
  for (sl_dtype dtype : {SL_F32, SL_F16}) {
    Accumulator serial(dtype, count);
    serial.args.stochastic = true, serial.args.seed = 9;
    serial.add(grad), serial.add(grad);
    sl_accumulate_stats added = serial.stats;
    std::vector<float> values = serial.read();
    for (int threads : {2, 3, 8}) {
      ThreadExecutor executor(threads);
      Accumulator parallel(dtype, count, executor.get());
      parallel.args.stochastic = true, parallel.args.seed = 9;
      parallel.add(grad), parallel.add(grad);
      EXPECT_EQ(std::memcmp(&added, &parallel.stats, sizeof added), 0) << threads;
      EXPECT_EQ(parallel.read(), values) << threads;
      EXPECT_EQ(std::memcmp(&serial.stats, &parallel.stats, sizeof added), 0) << threads;
      EXPECT_TRUE(parallel.intact());
    }
  }
}

TEST(Accumulate, TheReferenceEntryGivesWhatDispatchGives) {
  std::vector<float> grad = normal_values(100000, 1, 6);
  Accumulator dispatched(SL_F16, 100000), reference(SL_F16, 100000);
  dispatched.add(grad);
  reference.args.grad = grad.data(), reference.args.workspace = nullptr, reference.args.workspace_size = 0;
  ASSERT_EQ(sl_accumulate_reference(&reference.args), SL_OK);
  EXPECT_EQ(std::memcmp(&dispatched.stats, &reference.stats, sizeof reference.stats), 0);
  EXPECT_EQ(std::memcmp(dispatched.memory().data(), reference.memory().data(), 200000), 0);
  ASSERT_EQ(sl_measure_gradient(&dispatched.args), SL_OK);
  ASSERT_EQ(sl_measure_gradient_reference(&reference.args), SL_OK);
  EXPECT_EQ(std::memcmp(&dispatched.stats, &reference.stats, sizeof reference.stats), 0);
  std::vector<float> out(100000);
  reference.args.out = out.data();
  ASSERT_EQ(sl_read_accumulator_reference(&reference.args), SL_OK);
  EXPECT_EQ(dispatched.read(), out);
}

TEST(Accumulate, TheCapChoosesTheKernel) {
  IsaCap cap(SL_ISA_SCALAR);
  EXPECT_STREQ(sl_accumulate_kernel_name(), "scalar");
}

TEST(Accumulate, AnEmptyGradientIsNothing) {
  Accumulator sum(SL_F16, 0);
  sum.args.workspace = nullptr, sum.args.workspace_size = 0, sum.args.exponents = nullptr;
  sum.args.accumulator = nullptr, sum.args.grad = nullptr, sum.args.out = nullptr;
  std::memset(&sum.stats, 0xff, sizeof sum.stats);
  ASSERT_EQ(sl_accumulate(&sum.args), SL_OK);
  EXPECT_EQ(sum.stats.grad_sumsq, 0);
  ASSERT_EQ(sl_read_accumulator(&sum.args), SL_OK);
}

struct BadCall {
  const char *message;
  sl_status status;
  void (*spoil)(sl_accumulate_args *);
};

TEST(Accumulate, BadArgumentsAreNamed) {
  const std::vector<BadCall> accumulate = {
      {"count is -1, expected at least 0", SL_INVALID_ARGUMENT, [](auto *a) { a->count = -1; }},
      {"count is 9223372036854775807, expected at most 2^46", SL_OUT_OF_RANGE, [](auto *a) { a->count = INT64_MAX; }},
      {"grad is float64, expected float32", SL_UNSUPPORTED, [](auto *a) { a->grad_dtype = SL_F64; }},
      {"grad is int8, expected float32", SL_UNSUPPORTED, [](auto *a) { a->grad_dtype = SL_I8; }},
      {"grad is NULL, expected 10 elements", SL_INVALID_ARGUMENT, [](auto *a) { a->grad = nullptr; }},
      {"accumulator is bfloat16, expected float32 or float16", SL_UNSUPPORTED, [](auto *a) { a->dtype = SL_BF16; }},
      {"accumulator is int16, expected float32 or float16", SL_UNSUPPORTED, [](auto *a) { a->dtype = SL_I16; }},
      {"accumulator is NULL", SL_INVALID_ARGUMENT, [](auto *a) { a->accumulator = nullptr; }},
      {"exponents is NULL, expected 1 elements", SL_INVALID_ARGUMENT, [](auto *a) { a->exponents = nullptr; }},
      {"exponents are given with a float32", SL_INVALID_ARGUMENT, [](auto *a) { a->dtype = SL_F32; }},
      {"grad_scale is nan, expected a number", SL_INVALID_ARGUMENT, [](auto *a) { a->grad_scale = NAN; }},
      {"grad_scale is 1e+39, expected a number", SL_INVALID_ARGUMENT, [](auto *a) { a->grad_scale = 1e39; }},
      {"workspace_size is 63, expected at least 64", SL_OUT_OF_MEMORY, [](auto *a) { a->workspace_size = 63; }},
      {"workspace_size is 0, expected at least 64", SL_OUT_OF_MEMORY, [](auto *a) { a->workspace = nullptr; }},
  };
  std::vector<float> grad(10, 1);
  for (const BadCall &bad : accumulate) {
    Accumulator sum(SL_F16, 10);
    sum.args.grad = grad.data();
    bad.spoil(&sum.args);
    EXPECT_EQ(sl_accumulate(&sum.args), bad.status) << bad.message;
    EXPECT_NE(std::string(sl_last_error()).find(bad.message), std::string::npos) << sl_last_error();
  }
  Accumulator sum(SL_F32, 10);
  sum.args.out = grad.data(), sum.args.scale = INFINITY;
  EXPECT_EQ(sl_read_accumulator(&sum.args), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "scale is inf, expected a number that is finite in float32");
  sum.args.scale = 1, sum.args.out_dtype = SL_F64;
  EXPECT_EQ(sl_read_accumulator(&sum.args), SL_UNSUPPORTED);
  sum.args.out_dtype = SL_BOOL;
  EXPECT_EQ(sl_read_accumulator(&sum.args), SL_UNSUPPORTED);
  EXPECT_STREQ(sl_last_error(), "out is bool, expected float32, bfloat16 or float16");
  EXPECT_EQ(sl_measure_gradient(nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_accumulate_workspace_size(10, nullptr), SL_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace sluice_test

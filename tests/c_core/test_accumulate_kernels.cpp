// Every kernel table of accumulate that this machine runs, against the scalar one, bit for bit, between canaries: all
// dtypes, odd sizes and addresses, and values of every kind.
#include <gtest/gtest.h>

#include <functional>

#include <sluice/accumulate.h>

#include "support.h"

extern "C" {
#include "accumulate/kernel.h"
}

namespace sluice_test {
namespace {

const std::vector<sl_dtype> kDtypes = {SL_F32, SL_BF16, SL_F16};
const std::vector<int64_t> kCounts = {1, 7, 15, 16, 17, 31, 32, 33, 48, 100, 1023, 1024, 1025, 1039, 2100, 5000};

struct Values {
  const char *name;
  std::function<double(Random &)> next;
};

double wide(Random &random) { return std::exp2(random.uniform(-148, 120)) * (random.chance(0.5) ? 1 : -1); }

const std::vector<Values> kValues = {
    {"normal", [](Random &random) { return random.normal(); }},
    {"small", [](Random &random) { return random.normal(1e-7); }},
    {"subnormal", [](Random &random) { return random.normal(1e-43); }},
    {"all magnitudes", wide},
    {"largest", [](Random &random) { return random.chance(0.5) ? 3.4e38 : -6.5e4; }},
    {"mostly zero", [](Random &random) { return random.chance(0.02) ? random.normal() : 0; }},
    {"zero", [](Random &) { return 0.0; }},
    {"minus zero", [](Random &) { return -0.0; }},
    {"sometimes infinite", [](Random &random) { return random.chance(0.01) ? INFINITY : random.normal(); }},
    {"sometimes NaN", [](Random &random) { return random.chance(0.003) ? NAN : random.normal(1e-3); }},
};

// The operands of one call, each in guarded memory and off its alignment by one element if shifted.
struct Operands {
  GuardedBuffer grad, accumulator, exponents, out;
  sl_accumulate_args args{};
  sl_accumulate_stats stats{};

  Operands(int64_t count, sl_dtype grad_dtype, sl_dtype dtype, sl_dtype out_dtype, bool shifted) {
    auto buffer = [&](sl_dtype type) {
      size_t size = sl_dtype_size(type);
      return GuardedBuffer(static_cast<size_t>(count) * size, shifted ? size : 0);
    };
    grad = buffer(grad_dtype), accumulator = buffer(dtype), out = buffer(out_dtype);
    exponents = GuardedBuffer(static_cast<size_t>(sl_count_blocks(count)), shifted ? 1 : 0);
    args.count = count, args.grad_dtype = grad_dtype, args.dtype = dtype, args.out_dtype = out_dtype;
    args.grad = grad.data(), args.accumulator = accumulator.data(), args.out = out.data();
    args.exponents = dtype == SL_F16 ? static_cast<int8_t *>(exponents.data()) : nullptr;
    args.grad_scale = 1, args.scale = 1;
  }
  void fill_grad(const Values &values, uint64_t seed) {
    Random random(seed);
    for (int64_t i = 0; i < args.count; ++i) store_number(args.grad_dtype, grad.data(), i, values.next(random));
  }
  void run(sl_accumulate_block function) {
    sl_accumulate_stats sum{};
    for (int64_t block = 0; block < sl_count_blocks(args.count); ++block) {
      sl_accumulate_stats part;
      std::memset(&part, 0xa5, sizeof part);
      function(&args, block, &part);
      sum.grad_sumsq += part.grad_sumsq, sum.sum_sumsq += part.sum_sumsq, sum.error_sumsq += part.error_sumsq;
      sum.grad_amax = std::max(sum.grad_amax, part.grad_amax);
      sum.grad_nonfinite += part.grad_nonfinite, sum.underflow += part.underflow;
    }
    stats = sum;
  }
  bool intact() const { return grad.intact() && accumulator.intact() && exponents.intact() && out.intact(); }
};

bool same_values(sl_dtype dtype, const GuardedBuffer &left, const GuardedBuffer &right, int64_t count) {
  if (std::memcmp(left.data(), right.data(), left.size()) == 0) return true;
  for (int64_t i = 0; i < count; ++i) {  // NaN may differ in its sign and payload
    double x = load_number(dtype, left.data(), i), y = load_number(dtype, right.data(), i);
    if (std::isnan(x) && std::isnan(y)) continue;
    if (x != y || std::signbit(x) != std::signbit(y)) return false;
  }
  return true;
}

bool same_stats(const sl_accumulate_stats &left, const sl_accumulate_stats &right) {
  return std::memcmp(&left, &right, sizeof left) == 0;
}

class AccumulateKernel : public testing::TestWithParam<const sl_accumulate_kernel *> {};

std::vector<const sl_accumulate_kernel *> runnable_kernels() {
  std::vector<const sl_accumulate_kernel *> kernels;
  for (int i = 0; sl_accumulate_list_kernels(i); ++i) {
    if (sl_accumulate_list_kernels(i)->isa <= sl_cpu_detect()) kernels.push_back(sl_accumulate_list_kernels(i));
  }
  return kernels;
}

TEST_P(AccumulateKernel, AccumulatesAsTheScalarTier) {
  uint64_t seed = 1;
  for (sl_dtype dtype : {SL_F32, SL_F16}) {
    for (sl_dtype grad_dtype : kDtypes) {
      for (int64_t count : kCounts) {
        for (const Values &values : kValues) {
          bool shifted = ++seed % 2, stochastic = seed % 3 != 0;
          Operands expected(count, grad_dtype, dtype, SL_F32, shifted), got(count, grad_dtype, dtype, SL_F32, shifted);
          for (int step = 0; step < 3; ++step) {  // the first overwrites whatever was in fresh memory
            for (Operands *operands : {&expected, &got}) {
              operands->fill_grad(step < 2 ? kValues[seed % 3] : values, seed + static_cast<uint64_t>(step));
              operands->args.overwrite = step == 0, operands->args.stochastic = stochastic;
              operands->args.seed = seed * 7919 + static_cast<uint64_t>(step);
              operands->args.grad_scale = step == 1 ? 0.3 : 1;
            }
            expected.run(sl_accumulate_scalar.accumulate);
            got.run(GetParam()->accumulate);
            ASSERT_TRUE(same_values(dtype, expected.accumulator, got.accumulator, count))
                << sl_dtype_name(dtype) << " += " << sl_dtype_name(grad_dtype) << " [" << count << "] " << values.name
                << " step " << step;
            ASSERT_EQ(std::memcmp(expected.exponents.data(), got.exponents.data(), expected.exponents.size()), 0);
            ASSERT_TRUE(same_stats(expected.stats, got.stats))
                << values.name << " [" << count << "] " << sl_dtype_name(dtype) << " += " << sl_dtype_name(grad_dtype)
                << ": " << expected.stats.grad_sumsq << " " << got.stats.grad_sumsq << ", " << expected.stats.sum_sumsq
                << " " << got.stats.sum_sumsq << ", " << expected.stats.error_sumsq << " " << got.stats.error_sumsq
                << ", " << expected.stats.underflow << " " << got.stats.underflow;
            ASSERT_TRUE(expected.intact() && got.intact());
          }
        }
      }
    }
  }
}

TEST_P(AccumulateKernel, MeasuresAsTheScalarTier) {
  uint64_t seed = 1;
  for (sl_dtype dtype : kDtypes) {
    for (int64_t count : kCounts) {
      for (const Values &values : kValues) {
        Operands expected(count, dtype, SL_F32, SL_F32, ++seed % 2), got(count, dtype, SL_F32, SL_F32, seed % 2);
        expected.fill_grad(values, seed), got.fill_grad(values, seed);
        expected.run(sl_accumulate_scalar.measure);
        got.run(GetParam()->measure);
        ASSERT_TRUE(same_stats(expected.stats, got.stats)) << sl_dtype_name(dtype) << " " << count << values.name;
        ASSERT_TRUE(got.intact());
      }
    }
  }
}

TEST_P(AccumulateKernel, ReadsAsTheScalarTier) {
  uint64_t seed = 1;
  for (sl_dtype dtype : {SL_F32, SL_F16}) {
    for (sl_dtype out_dtype : kDtypes) {
      for (int64_t count : kCounts) {
        for (const Values &values : kValues) {
          bool shifted = ++seed % 2;
          Operands expected(count, SL_F32, dtype, out_dtype, shifted), got(count, SL_F32, dtype, out_dtype, shifted);
          for (Operands *operands : {&expected, &got}) {
            operands->fill_grad(values, seed);
            operands->args.overwrite = true;
            operands->args.scale = seed % 3 ? 1.0 / 3 : 1;
            operands->run(sl_accumulate_scalar.accumulate);
          }
          expected.run(sl_accumulate_scalar.read);
          got.run(GetParam()->read);
          ASSERT_TRUE(same_values(out_dtype, expected.out, got.out, count))
              << sl_dtype_name(dtype) << " -> " << sl_dtype_name(out_dtype) << " [" << count << "] " << values.name;
          ASSERT_TRUE(same_stats(expected.stats, got.stats)) << values.name;
          ASSERT_TRUE(got.intact());
        }
      }
    }
  }
}

TEST_P(AccumulateKernel, ReadsAFloat32AccumulatorInPlace) {
  Operands operands(1500, SL_F32, SL_F32, SL_F32, true);
  operands.fill_grad(kValues[0], 5);
  operands.args.overwrite = true;
  operands.run(GetParam()->accumulate);
  operands.args.out = operands.args.accumulator, operands.args.scale = 0.125;
  operands.run(GetParam()->read);
  for (int64_t i = 0; i < 1500; ++i) {
    ASSERT_EQ(load_number(SL_F32, operands.accumulator.data(), i), load_number(SL_F32, operands.grad.data(), i) / 8);
  }
}

INSTANTIATE_TEST_SUITE_P(Tiers, AccumulateKernel, testing::ValuesIn(runnable_kernels()),
                         [](const auto &tier) { return std::string(tier.param->name); });

}  // namespace
}  // namespace sluice_test

// The CUDA kernels of accumulate, compiled as C++ and run on the host (cuda_on_host/), against the reference: the same
// bits in the accumulator and in what is read from it.
#include <gtest/gtest.h>

#include "cuda_on_host/cuda_runtime.h"

// A CUDA build has these symbols already.
#define sluice_cuda sluice_cuda_on_host
#define sl_accumulate_cuda_workspace_size workspace_size_on_host
#define sl_accumulate_cuda accumulate_on_host
#define sl_measure_gradient_cuda measure_gradient_on_host
#define sl_read_accumulator_cuda read_accumulator_on_host
#include "accumulate/cuda/accumulate.cu"

#include "support.h"

using namespace sluice_test;

namespace {

const std::vector<sl_dtype> kDtypes = {SL_F32, SL_BF16, SL_F16};

struct Values {
  const char *name;
  std::function<double(Random &)> next;
};
const std::vector<Values> kValues = {
    {"normal", [](Random &random) { return random.normal(); }},
    {"subnormal", [](Random &random) { return random.normal(1e-43); }},
    {"all magnitudes", [](Random &random) { return random.normal() * std::exp2(random.uniform(-148, 100)); }},
    {"minus zero", [](Random &) { return -0.0; }},
    {"sometimes infinite", [](Random &random) { return random.chance(0.01) ? INFINITY : random.normal(); }},
    {"sometimes NaN", [](Random &random) { return random.chance(0.003) ? NAN : random.normal(1e-3); }},
};

// One side of a comparison: operands in guarded memory.
struct Side {
  GuardedBuffer grad, accumulator, exponents, out, workspace;
  sl_accumulate_args args{};
  sl_accumulate_stats stats{};

  Side(int64_t count, sl_dtype grad_dtype, sl_dtype dtype, sl_dtype out_dtype) {
    auto bytes = [&](sl_dtype type) { return static_cast<size_t>(count) * sl_dtype_size(type); };
    grad = GuardedBuffer(bytes(grad_dtype)), accumulator = GuardedBuffer(bytes(dtype));
    out = GuardedBuffer(bytes(out_dtype)), exponents = GuardedBuffer(static_cast<size_t>(sl_count_blocks(count)));
    size_t workspace_bytes = 0;
    EXPECT_EQ(workspace_size_on_host(count, &workspace_bytes), SL_OK);
    workspace = GuardedBuffer(workspace_bytes);
    args.count = count, args.grad_dtype = grad_dtype, args.dtype = dtype, args.out_dtype = out_dtype;
    args.grad = grad.data(), args.accumulator = accumulator.data(), args.out = out.data();
    args.exponents = dtype == SL_F16 ? static_cast<int8_t *>(exponents.data()) : nullptr;
    args.stats = &stats, args.workspace = workspace.data(), args.workspace_size = workspace_bytes;
    args.scale = 1.0 / 3;
  }
  void fill_grad(const Values &values, uint64_t seed) {
    Random random(seed);
    for (int64_t i = 0; i < args.count; ++i) store_number(args.grad_dtype, grad.data(), i, values.next(random));
  }
  bool intact() const {
    return grad.intact() && accumulator.intact() && exponents.intact() && out.intact() && workspace.intact();
  }
};

// Bits, but for those of a NaN.
bool same_values(sl_dtype dtype, const GuardedBuffer &left, const GuardedBuffer &right, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    double x = load_number(dtype, left.data(), i), y = load_number(dtype, right.data(), i);
    if (std::isnan(x) && std::isnan(y)) continue;
    if (x != y || std::signbit(x) != std::signbit(y)) return false;
  }
  return true;
}

// The CPU adds squares in float32, the kernels in float64.
void expect_same_stats(const sl_accumulate_stats &got, const sl_accumulate_stats &want) {
  auto near = [](double x, double y) { return std::fabs(x - y) <= 1e-5 * std::fabs(y) || x == y; };
  EXPECT_PRED2(near, got.grad_sumsq, want.grad_sumsq);
  EXPECT_EQ(got.grad_amax, want.grad_amax);
  EXPECT_EQ(got.grad_nonfinite, want.grad_nonfinite);
  EXPECT_PRED2(near, got.sum_sumsq, want.sum_sumsq);
  EXPECT_PRED2(near, got.error_sumsq, want.error_sumsq);
  EXPECT_EQ(got.underflow, want.underflow);
}

// Overwrites, adds twice, measures and reads.
void compare_with_reference(Side &got, Side &want, const Values &values, bool stochastic, uint64_t seed) {
  int64_t count = got.args.count;
  for (int step = 0; step < 3; ++step) {
    for (Side *side : {&got, &want}) {
      side->fill_grad(step < 2 ? kValues[0] : values, seed + static_cast<uint64_t>(step));
      side->args.overwrite = step == 0, side->args.stochastic = stochastic;
      side->args.seed = seed * 7919 + static_cast<uint64_t>(step), side->args.grad_scale = step == 1 ? 0.3 : 1;
    }
    ASSERT_EQ(accumulate_on_host(&got.args, nullptr), SL_OK) << sl_last_error();
    ASSERT_EQ(sl_accumulate_reference(&want.args), SL_OK) << sl_last_error();
    ASSERT_TRUE(same_values(got.args.dtype, got.accumulator, want.accumulator, count)) << "step " << step;
    ASSERT_EQ(std::memcmp(got.exponents.data(), want.exponents.data(), want.exponents.size()), 0);
    expect_same_stats(got.stats, want.stats);
  }
  ASSERT_EQ(measure_gradient_on_host(&got.args, nullptr), SL_OK);
  ASSERT_EQ(sl_measure_gradient_reference(&want.args), SL_OK);
  expect_same_stats(got.stats, want.stats);
  ASSERT_EQ(read_accumulator_on_host(&got.args, nullptr), SL_OK);
  ASSERT_EQ(sl_read_accumulator_reference(&want.args), SL_OK);
  ASSERT_TRUE(same_values(got.args.out_dtype, got.out, want.out, count));
  expect_same_stats(got.stats, want.stats);
  ASSERT_TRUE(got.intact());
}

}  // namespace

TEST(AccumulateCudaOnHost, AgreesWithTheReferenceBitForBit) {
  uint64_t seed = 1;
  for (sl_dtype dtype : {SL_F32, SL_F16}) {
    for (sl_dtype grad_dtype : kDtypes) {
      for (int64_t count : {0, 1, 33, 1023, 2100}) {
        for (const Values &values : kValues) {
          sl_dtype out_dtype = kDtypes[++seed % 3];
          SCOPED_TRACE(testing::Message() << sl_dtype_name(dtype) << " += " << sl_dtype_name(grad_dtype) << " ["
                                          << count << "] -> " << sl_dtype_name(out_dtype) << " " << values.name);
          Side got(count, grad_dtype, dtype, out_dtype), want(count, grad_dtype, dtype, out_dtype);
          compare_with_reference(got, want, values, seed % 4 != 0, seed);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(AccumulateCudaOnHost, WarpsTakeSeveralBlocksOfALargeTensor) {
  const int64_t count = (sluice_cuda::MOST_PARTS + 3) * SL_ACCUMULATE_BLOCK + 5;
  Side got(count, SL_BF16, SL_F16, SL_BF16), want(count, SL_BF16, SL_F16, SL_BF16);
  for (Side *side : {&got, &want}) {
    for (int64_t i = 0; i < count; ++i) {
      store_number(SL_BF16, side->grad.data(), i, static_cast<double>(i % 1021 - 400));
    }
    side->args.overwrite = side->args.stochastic = true, side->args.grad_scale = 0.3;
  }
  ASSERT_EQ(accumulate_on_host(&got.args, nullptr), SL_OK) << sl_last_error();
  ASSERT_EQ(sl_accumulate_reference(&want.args), SL_OK) << sl_last_error();
  EXPECT_EQ(std::memcmp(got.accumulator.data(), want.accumulator.data(), want.accumulator.size()), 0);
  expect_same_stats(got.stats, want.stats);
}

TEST(AccumulateCudaOnHost, ResultDoesNotDependOnTheOrderOfThreads) {
  Side got(3000, SL_F32, SL_F16, SL_F32), want(3000, SL_F32, SL_F16, SL_F32);
  cuda_on_host::reverse_order = true;
  compare_with_reference(got, want, kValues[0], true, 4);
  cuda_on_host::reverse_order = false;
}

TEST(AccumulateCudaOnHost, FailuresNameTheirCause) {
  Side side(2000, SL_F32, SL_F32, SL_F32);
  side.args.grad_scale = 1;
  cuda_on_host::next_error = cudaErrorInvalidConfiguration;
  EXPECT_EQ(accumulate_on_host(&side.args, nullptr), SL_INTERNAL);
  EXPECT_STREQ(sl_last_error(),
               "accumulate on CUDA failed: invalid configuration argument "
               "(cudaErrorInvalidConfiguration)");
  --side.args.workspace_size;
  EXPECT_EQ(accumulate_on_host(&side.args, nullptr), SL_OUT_OF_MEMORY);
  EXPECT_STREQ(sl_last_error(), "workspace_size is 95, expected at least 96");
  side.args.grad_scale = INFINITY;
  EXPECT_EQ(accumulate_on_host(&side.args, nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(measure_gradient_on_host(nullptr, nullptr), SL_INVALID_ARGUMENT);
}

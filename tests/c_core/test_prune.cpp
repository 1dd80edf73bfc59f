// Channel norms by their contract: cases worked by hand, every kernel against the definition bit for bit between
// canaries, any layout, any number of threads, bad input.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include <sluice/prune.h>

#include "support.h"

extern "C" {
#include "prune/kernel.h"
}

namespace sluice_test {
namespace {

const std::vector<sl_dtype> kDtypes = {SL_F32, SL_BF16, SL_F16, SL_F64};

// A weight in guarded memory with the given order of its dimensions there, and gaps of `gap` elements between rows.
struct Weight {
  GuardedBuffer memory, norms;
  sl_channel_norms_args args{};

  Weight(sl_dtype dtype, std::vector<int64_t> sizes, std::vector<size_t> order, int64_t gap, int64_t dim) {
    args.dtype = dtype, args.rank = static_cast<int64_t>(sizes.size()), args.dim = dim;
    int64_t extent = 1;
    for (size_t place = 0; place < order.size(); ++place) {  // innermost first
      args.sizes[order[place]] = sizes[order[place]];
      args.strides[order[place]] = extent;
      extent *= std::max<int64_t>(sizes[order[place]], 1);
      if (place == 0) extent += gap;
    }
    size_t size = sl_dtype_size(dtype);
    memory = GuardedBuffer(static_cast<size_t>(extent) * size, size);
    norms = GuardedBuffer(static_cast<size_t>(sizes[static_cast<size_t>(dim)]) * (dtype == SL_F64 ? 8 : 4), 4);
    if (dtype == SL_F64) norms = GuardedBuffer(norms.size());
    args.weight = memory.data(), args.norms = norms.data();
  }
  // Calls function(channel, element index in memory) for every element.
  template <typename Function>
  void for_each(Function function) const {
    int64_t total = 1;
    for (int64_t i = 0; i < args.rank; ++i) total *= args.sizes[i];
    for (int64_t number = 0; number < total; ++number) {
      int64_t rest = number, index = 0, channel = 0;
      for (int64_t i = args.rank - 1; i >= 0; --i) {
        int64_t place = rest % args.sizes[i];
        rest /= args.sizes[i];
        index += place * args.strides[i];
        if (i == args.dim) channel = place;
      }
      function(channel, index);
    }
  }
  void fill(Random &random) {
    for_each([&](int64_t, int64_t index) { store_number(args.dtype, memory.data(), index, random.normal()); });
  }
  std::vector<double> expected() const {
    std::vector<double> sums(static_cast<size_t>(args.sizes[args.dim]), 0);
    for_each([&](int64_t channel, int64_t index) {
      sums[static_cast<size_t>(channel)] += std::fabs(load_number(args.dtype, memory.data(), index));
    });
    return sums;
  }
  double norm(int64_t channel) const {
    return load_number(args.dtype == SL_F64 ? SL_F64 : SL_F32, norms.data(), channel);
  }
  bool intact() const { return memory.intact() && norms.intact(); }
};

TEST(ChannelNorms, AreSumsOfMagnitudes) {
  const float values[] = {1, -2, 3, -4, 0.5f, -0.0f};
  float norms[3];
  sl_channel_norms_args args{};
  args.dtype = SL_F32, args.weight = values, args.rank = 2, args.norms = norms;
  args.sizes[0] = 2, args.sizes[1] = 3, args.strides[0] = 3, args.strides[1] = 1;
  ASSERT_EQ(sl_channel_norms(&args), SL_OK) << sl_last_error();
  EXPECT_EQ((std::vector<float>{norms[0], norms[1]}), (std::vector<float>{6, 4.5f}));
  args.dim = 1;
  ASSERT_EQ(sl_channel_norms(&args), SL_OK) << sl_last_error();
  EXPECT_EQ((std::vector<float>{norms[0], norms[1], norms[2]}), (std::vector<float>{5, 2.5f, 3}));
  args.strides[0] = 0;  // the first row twice
  ASSERT_EQ(sl_channel_norms(&args), SL_OK) << sl_last_error();
  EXPECT_EQ(norms[2], 6);
}

TEST(ChannelNorms, OfEveryLayoutAreTheDefinition) {
  const std::vector<std::vector<int64_t>> shapes = {
      {1},    {37},      {5, 33},   {64, 1, 3, 3}, {24, 17, 3, 3}, {300, 70}, {2, 3, 4, 5, 6},
      {0, 4}, {4, 0, 3}, {1, 1, 1}, {16, 32, 1, 1}};
  Random random(1);
  for (sl_dtype dtype : kDtypes) {
    for (const auto &shape : shapes) {
      for (int trial = 0; trial < 4; ++trial) {
        std::vector<size_t> order(shape.size());
        std::iota(order.begin(), order.end(), size_t{0});
        std::reverse(order.begin(), order.end());
        if (trial) {
          for (size_t i = order.size(); i > 1; --i)
            std::swap(order[i - 1], order[static_cast<size_t>(random.integer(0, static_cast<int64_t>(i) - 1))]);
        }
        int64_t dim = random.integer(0, static_cast<int64_t>(shape.size()) - 1);
        Weight weight(dtype, shape, order, trial == 3 ? 5 : 0, dim);
        weight.fill(random);
        ASSERT_EQ(sl_channel_norms(&weight.args), SL_OK) << sl_last_error();
        std::vector<double> expected = weight.expected();
        std::vector<double> fast;
        for (size_t i = 0; i < expected.size(); ++i) {
          fast.push_back(weight.norm(static_cast<int64_t>(i)));
          double tolerance = expected[i] * (dtype == SL_F64 ? 1e-13 : 6.1e-8);
          ASSERT_NEAR(fast[i], expected[i], tolerance);
        }
        ASSERT_TRUE(weight.intact());
        ASSERT_EQ(sl_channel_norms_reference(&weight.args), SL_OK);
        for (size_t i = 0; i < fast.size(); ++i) ASSERT_EQ(fast[i], weight.norm(static_cast<int64_t>(i)));
      }
    }
  }
}

TEST(ChannelNorms, EveryKernelHasTheBitsOfTheDefinition) {
  Random random(2);
  for (int number = 0; const sl_prune_kernel *kernel = sl_prune_list_kernels(number); ++number) {
    if (kernel->isa > sl_cpu_isa()) continue;
    for (sl_dtype dtype : kDtypes) {
      for (int64_t count : {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1027}) {
        size_t size = sl_dtype_size(dtype);
        GuardedBuffer values(static_cast<size_t>(count) * size, size), sums(static_cast<size_t>(count) * 8, 8);
        std::vector<double> expected(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) {
          double value = random.chance(0.01) ? -0.0 : random.normal() * std::exp2(random.uniform(-20, 12));
          store_number(dtype, values.data(), i, value);
          store_number(SL_F64, sums.data(), i, 1.0 / 3);
          expected[static_cast<size_t>(i)] = 1.0 / 3 + std::fabs(load_number(dtype, values.data(), i));
        }
        ASSERT_EQ(kernel->add_run(dtype, values.data(), count), sl_prune_scalar.add_run(dtype, values.data(), count))
            << kernel->name << " " << count;
        kernel->add_to_each(dtype, values.data(), count, static_cast<double *>(sums.data()));
        for (int64_t i = 0; i < count; ++i)
          ASSERT_EQ(load_number(SL_F64, sums.data(), i), expected[static_cast<size_t>(i)]) << kernel->name;
        ASSERT_TRUE(values.intact() && sums.intact()) << kernel->name;
      }
    }
  }
}

TEST(ChannelNorms, ThreadsChangeNoBit) {
  Random random(3);
  for (int64_t dim : {0, 1}) {
    Weight weight(SL_F32, {500, 900}, {1, 0}, 0, dim);
    weight.fill(random);
    ASSERT_EQ(sl_channel_norms(&weight.args), SL_OK);
    std::vector<unsigned char> serial(weight.norms.size());
    std::memcpy(serial.data(), weight.norms.data(), serial.size());
    std::memset(weight.norms.data(), 0, serial.size());
    ThreadExecutor threads(3);
    weight.args.executor = threads.get();
    ASSERT_EQ(sl_channel_norms(&weight.args), SL_OK);
    EXPECT_EQ(std::memcmp(serial.data(), weight.norms.data(), serial.size()), 0);
  }
}

TEST(ChannelNorms, WhatIsNotFiniteShowsInItsChannelOnly) {
  for (int64_t dim : {0, 1}) {
    Random random(4);
    Weight weight(SL_F32, {40, 40}, {1, 0}, 0, dim);
    weight.fill(random);
    float *values = static_cast<float *>(weight.memory.data());
    int64_t channel = weight.args.strides[dim], other = weight.args.strides[1 - dim];
    values[3 * channel + 7 * other] = NAN;
    values[5 * channel + 39 * other] = -INFINITY;
    values[6 * channel] = 3e38f, values[6 * channel + other] = 3e38f;
    ASSERT_EQ(sl_channel_norms(&weight.args), SL_OK);
    for (int64_t i = 0; i < 40; ++i) {
      EXPECT_EQ(std::isnan(weight.norm(i)), i == 3);
      EXPECT_EQ(std::isinf(weight.norm(i)), i == 5 || i == 6);
    }
  }
}

TEST(ChannelNorms, RefuseBadInputWithItsValue) {
  Weight weight(SL_F32, {4, 5}, {1, 0}, 0, 0);
  auto message = [&](auto change) -> std::string {
    sl_channel_norms_args args = weight.args;
    change(args);
    EXPECT_NE(sl_channel_norms(&args), SL_OK);
    std::string text = sl_last_error();
    EXPECT_NE(sl_channel_norms_reference(&args), SL_OK);
    return text;
  };
  using Args = sl_channel_norms_args;
  EXPECT_EQ(sl_channel_norms(nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(message([](Args &a) { a.dtype = SL_I32; }),
            "weight is int32, expected float32, bfloat16, float16 or float64");
  EXPECT_EQ(message([](Args &a) { a.rank = 0; }), "rank is 0, expected 1 to 8");
  EXPECT_EQ(message([](Args &a) { a.rank = 9; }), "rank is 9, expected 1 to 8");
  EXPECT_EQ(message([](Args &a) { a.dim = 2; }), "dim is 2, expected 0 to 1");
  EXPECT_EQ(message([](Args &a) { a.dim = -1; }), "dim is -1, expected 0 to 1");
  EXPECT_EQ(message([](Args &a) { a.sizes[1] = -3; }), "sizes[1] is -3, expected at least 0");
  EXPECT_EQ(message([](Args &a) { a.strides[0] = -1; }), "strides[0] is -1, expected at least 0");
  EXPECT_EQ(message([](Args &a) { a.weight = nullptr; }), "weight is NULL, expected 20 elements");
  EXPECT_EQ(message([](Args &a) { a.norms = nullptr; }), "norms is NULL, expected 4 elements");
  EXPECT_NE(message([](Args &a) { a.sizes[1] = INT64_MAX; }).find("within 2^46 elements"), std::string::npos);
  EXPECT_NE(message([](Args &a) { a.strides[1] = INT64_MAX; }).find("within 2^46 elements"), std::string::npos);
}

TEST(ChannelNorms, NamesTheKernelThatRuns) {
  std::string name = sl_channel_norms_kernel_name();
  EXPECT_TRUE(name == "avx2" || name == "scalar");
}

}  // namespace
}  // namespace sluice_test

// What the tests of quantize share: packed weights, linear layers and convolutions between canaries, run by a tier and
// by the reference.
#ifndef SLUICE_TESTS_QUANTIZE_PROBLEM_H
#define SLUICE_TESTS_QUANTIZE_PROBLEM_H

#include <gtest/gtest.h>

#include <functional>

#include <sluice/quantize.h>

#include "support.h"

extern "C" {
#include "quantize/kernel.h"
}

namespace sluice_test {

using Fill = std::function<double(Random &)>;

inline std::vector<sl_isa> quantize_tiers() {
  std::vector<sl_isa> tiers;
  for (int i = 0; sl_quantize_list_kernels(i); ++i) {
    if (sl_quantize_list_kernels(i)->isa <= sl_cpu_detect()) tiers.push_back(sl_quantize_list_kernels(i)->isa);
  }
  return tiers;
}

inline GuardedBuffer make_values(sl_dtype dtype, int64_t count, const Fill &next, Random &random,
                                 bool shifted = false) {
  size_t size = sl_dtype_size(dtype);
  GuardedBuffer buffer(static_cast<size_t>(count) * size, shifted ? size : 0);
  for (int64_t i = 0; i < count; ++i) store_number(dtype, buffer.data(), i, next(random));
  return buffer;
}

// A weight packed from random values, in guarded memory.
struct Weight {
  sl_quantized_weight sizes{};
  GuardedBuffer packed, scale;

  Weight(int64_t outputs, int64_t inputs, int bits, int64_t group_size, int64_t groups, const Fill &next,
         Random &random) {
    sizes.out_features = outputs, sizes.in_features = inputs, sizes.bits = bits, sizes.group_size = group_size;
    sizes.groups = groups;
    int64_t bytes = 0, scale_groups = 0, padded = 0;
    EXPECT_EQ(sl_packed_weight_size(&sizes, &bytes, &scale_groups, &padded), SL_OK) << sl_last_error();
    packed = GuardedBuffer(static_cast<size_t>(bytes));
    scale = GuardedBuffer(static_cast<size_t>(scale_groups * padded) * sizeof(float));
    GuardedBuffer values = make_values(SL_F32, outputs * inputs, next, random);
    sl_status status = sl_pack_weight(&sizes, SL_F32, values.data(), packed.data(), static_cast<float *>(scale.data()));
    EXPECT_EQ(status, SL_OK) << sl_last_error();
    EXPECT_TRUE(packed.intact() && scale.intact() && values.intact());
    sizes.packed = packed.data(), sizes.scale = static_cast<const float *>(scale.data());
  }
  bool intact() const { return packed.intact() && scale.intact(); }
};

// Runs call with exactly the workspace that it asks for.
template <typename Args>
sl_status run_guarded(Args args, sl_status (*measure)(const Args *, size_t *), sl_status (*call)(const Args *)) {
  size_t bytes = 0;
  if (sl_status status = measure(&args, &bytes); status != SL_OK) return status;
  GuardedBuffer workspace(bytes);
  if (bytes) std::memset(workspace.data(), 0xff, bytes);
  args.workspace = workspace.data(), args.workspace_size = bytes;
  sl_status status = call(&args);
  EXPECT_TRUE(workspace.intact());
  return status;
}

// Integer sums are exact; float32 sums over segments, and the rounding of out, are not.
inline void expect_close(sl_dtype dtype, const GuardedBuffer &got, const GuardedBuffer &wanted, int64_t count,
                         const std::string &where) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    double value = load_number(dtype, wanted.data(), i);
    if (std::isfinite(value)) largest = std::max(largest, std::fabs(value));
  }
  double rounding = dtype == SL_F32 ? 0 : dtype == SL_BF16 ? 0x1p-7 : 0x1p-10;
  for (int64_t i = 0; i < count; ++i) {
    double x = load_number(dtype, got.data(), i), y = load_number(dtype, wanted.data(), i);
    if (std::isnan(y)) {
      ASSERT_TRUE(std::isnan(x)) << where << " element " << i << " is " << x << ", expected NaN";
    } else if (x != y) {
      ASSERT_LE(std::fabs(x - y), 2e-6 * largest + rounding * std::fabs(y))
          << where << " element " << i << " is " << x << ", expected " << y;
    }
  }
}

}  // namespace sluice_test

#endif

// Half-precision conversions: every float16 and bfloat16 value round-trips, and rounding is to nearest even.
#include <gtest/gtest.h>

#include <cmath>

extern "C" {
#include "runtime/number.h"
}

TEST(Number, EveryFloat16RoundTrips) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    float value = sl_f16_to_float(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(sl_f16_to_float(sl_float_to_f16(value))));
    } else {
      ASSERT_EQ(sl_float_to_f16(value), bits) << value;
    }
  }
}

TEST(Number, EveryBfloat16RoundTrips) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    float value = sl_bf16_to_float(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(sl_bf16_to_float(sl_float_to_bf16(value))));
    } else {
      ASSERT_EQ(sl_float_to_bf16(value), bits) << value;
    }
  }
}

TEST(Number, Float16RoundsHalfToEvenAtEveryGap) {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    float low = sl_f16_to_float(static_cast<uint16_t>(bits));
    float high = sl_f16_to_float(static_cast<uint16_t>(bits + 1));
    float middle = low + (high - low) / 2;
    ASSERT_EQ(sl_float_to_f16(middle), bits % 2 ? bits + 1 : bits);
    ASSERT_EQ(sl_float_to_f16(std::nextafter(middle, 0.0f)), bits);
    ASSERT_EQ(sl_float_to_f16(std::nextafter(middle, INFINITY)), bits + 1);
  }
}

TEST(Number, OverflowGoesToInfinity) {
  EXPECT_EQ(sl_float_to_f16(65519.0f), 0x7bff);
  EXPECT_EQ(sl_float_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(sl_float_to_f16(-1e30f), 0xfc00);
  EXPECT_EQ(sl_float_to_f16(INFINITY), 0x7c00);
  EXPECT_EQ(sl_float_to_bf16(INFINITY), 0x7f80);
}

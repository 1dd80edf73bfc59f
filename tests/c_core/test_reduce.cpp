// The arithmetic of the collectives: the reference against cases worked by hand, every kernel table that this machine
// runs against the reference, bit for bit and between canaries, and what is refused.
#include <gtest/gtest.h>

#include <limits>

#include "support.h"

extern "C" {
#include "comm/kernel.h"
}

namespace sluice_test {
namespace {

const std::vector<sl_dtype> kDtypes = {SL_F32, SL_BF16, SL_F16, SL_F64, SL_I8, SL_U8, SL_I16, SL_I32, SL_I64, SL_BOOL};
const std::vector<sl_dtype> kFloats = {SL_F32, SL_BF16, SL_F16, SL_F64};
const std::vector<sl_reduce_op> kOps = {SL_REDUCE_SUM, SL_REDUCE_AVG,  SL_REDUCE_PRODUCT,
                                        SL_REDUCE_MIN, SL_REDUCE_MAX,  SL_REDUCE_BAND,
                                        SL_REDUCE_BOR, SL_REDUCE_BXOR, SL_REDUCE_PREMUL_SUM};
const std::vector<int> kSources = {1, 2, 3, 4, 5, 8, 17};
// Round the vectors of every tier, whatever the size of an element, and round the tiles of 4096 bytes.
const std::vector<size_t> kCounts = {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 130, 511, 1027, 4099};

bool is_float(sl_dtype dtype) { return dtype <= SL_F64; }
bool exists(sl_dtype dtype, sl_reduce_op op) { return sl_reduce_validate(dtype, op, 1) == SL_OK; }

// Numbers of a dtype to take operands from; with special values among them or without.
class Pool {
 public:
  Pool(sl_dtype dtype, bool special) : size_(sl_dtype_size(dtype)), bytes_(kElements * size_) {
    Random random(static_cast<uint64_t>(dtype) * 2 + special);
    for (size_t i = 0; i < kElements; ++i) {
      if (is_float(dtype)) {
        store_float(dtype, i, random, special);
      } else {
        store_integer(i, random, special);
      }
    }
  }
  const unsigned char *slice(size_t count, Random &random) const {
    return bytes_.data() + static_cast<size_t>(random.integer(0, static_cast<int64_t>(kElements - count))) * size_;
  }

 private:
  static constexpr size_t kElements = 20000;
  void store_float(sl_dtype dtype, size_t i, Random &random, bool special) {
    static const std::vector<double> values = {0.0,    -0.0,   0.0,     -0.0,   INFINITY, -INFINITY,
                                               NAN,    3.4e38, -3.4e38, 65504,  -65504,   1e-41,
                                               -1e-41, 3e-8,   6e-5,    1e-310, 1.7e308};
    double value = random.normal();
    if (special && random.chance(0.1)) value = random.pick(values);
    if (special && random.chance(0.1)) value *= std::exp2(random.uniform(-140, 127));
    store_number(dtype, bytes_.data(), static_cast<int64_t>(i), value);
    // Any bits at all: NaN of either kind and sign with any payload among them.
    if (special && random.chance(0.02)) store_bits(i, static_cast<uint64_t>(random.integer(INT64_MIN, INT64_MAX)));
    if (special && random.chance(0.005)) std::memset(&bytes_[i * size_], 0xff, size_);
  }
  void store_integer(size_t i, Random &random, bool special) {
    uint64_t sign = uint64_t{1} << (8 * size_ - 1);
    store_bits(i, static_cast<uint64_t>(random.integer(INT64_MIN, INT64_MAX)));
    if (random.chance(0.3)) store_bits(i, 0);
    if (special && random.chance(0.2)) store_bits(i, random.pick<uint64_t>({sign, sign - 1, ~uint64_t{0}, 1, 2}));
  }
  void store_bits(size_t i, uint64_t bits) { std::memcpy(&bytes_[i * size_], &bits, size_); }  // little-endian

  size_t size_;
  std::vector<unsigned char> bytes_;
};

// The operands of one reduction in guarded memory, at addresses that are off by `shift` and more bytes.
struct Operands {
  std::vector<GuardedBuffer> in;
  GuardedBuffer out;
  std::vector<const void *> pointers;
  sl_reduce_args args{};

  Operands(sl_dtype dtype, sl_reduce_op op, int sources, size_t count, size_t shift, double factor = 1) {
    size_t bytes = count * sl_dtype_size(dtype);
    for (int source = 0; source < sources; ++source) {
      in.emplace_back(bytes, shift * static_cast<size_t>(1 + source % 5));
      pointers.push_back(in.back().data());
    }
    out = GuardedBuffer(bytes, shift);
    args = {out.data(), pointers.data(), sources, count, dtype, op, factor};
  }
  void fill(const Pool &pool, uint64_t seed) {
    Random random(seed);
    for (GuardedBuffer &buffer : in) std::memcpy(buffer.data(), pool.slice(args.count, random), buffer.size());
  }
  bool intact() const {
    for (const GuardedBuffer &buffer : in) {
      if (!buffer.intact()) return false;
    }
    return out.intact();
  }
};

// Bit for bit, except which NaN a NaN is.
bool same_result(const sl_reduce_args &args, const void *left, const void *right) {
  size_t bytes = args.count * sl_dtype_size(args.dtype);
  if (bytes == 0 || std::memcmp(left, right, bytes) == 0) return true;
  if (!is_float(args.dtype)) return false;
  std::vector<double> aligned[2] = {std::vector<double>(bytes / 8 + 1), std::vector<double>(bytes / 8 + 1)};
  std::memcpy(aligned[0].data(), left, bytes), std::memcpy(aligned[1].data(), right, bytes);
  for (size_t i = 0; i < args.count; ++i) {
    double x = load_number(args.dtype, aligned[0].data(), static_cast<int64_t>(i));
    double y = load_number(args.dtype, aligned[1].data(), static_cast<int64_t>(i));
    if (std::isnan(x) && std::isnan(y)) continue;
    if (x != y || std::signbit(x) != std::signbit(y)) return false;
  }
  return true;
}

std::string describe(const sl_reduce_args &args) {
  return std::string(sl_reduce_op_name(args.op)) + " of " + std::to_string(args.sources) + " " +
         sl_dtype_name(args.dtype) + "[" + std::to_string(args.count) + "]";
}

class ReduceKernel : public testing::TestWithParam<const sl_reduce_kernel *> {};

std::vector<const sl_reduce_kernel *> runnable_kernels() {
  std::vector<const sl_reduce_kernel *> kernels;
  for (int i = 0; sl_reduce_list_kernels(i); ++i) {
    if (sl_reduce_list_kernels(i)->isa <= sl_cpu_detect()) kernels.push_back(sl_reduce_list_kernels(i));
  }
  return kernels;
}

TEST_P(ReduceKernel, ReducesAsTheReference) {
  Random random(1);
  for (sl_dtype dtype : kDtypes) {
    const Pool pools[] = {{dtype, false}, {dtype, true}};
    for (sl_reduce_op op : kOps) {
      if (!exists(dtype, op)) continue;
      for (int sources : kSources) {
        for (size_t count : kCounts) {
          size_t shift = random.pick<size_t>({0, sl_dtype_size(dtype), 1});
          double factor = random.pick<double>({1.0 / 3, -2.5});
          Operands expected(dtype, op, sources, count, shift, factor), got(dtype, op, sources, count, shift, factor);
          const Pool &pool = pools[random.integer(0, 1)];
          uint64_t seed = static_cast<uint64_t>(random.integer(0, INT64_MAX));
          expected.fill(pool, seed), got.fill(pool, seed);
          sl_reduce_reference(&expected.args);
          GetParam()->reduce(&got.args);
          ASSERT_TRUE(same_result(got.args, expected.out.data(), got.out.data())) << describe(got.args);
          ASSERT_TRUE(got.intact() && expected.intact()) << describe(got.args);
          for (size_t i = 0; i < got.in.size() && count; ++i) {
            ASSERT_EQ(std::memcmp(got.in[i].data(), expected.in[i].data(), got.in[i].size()), 0) << describe(got.args);
          }
        }
      }
    }
  }
}

TEST_P(ReduceKernel, WritesOverAnyOfItsSources) {
  Random random(1);
  for (sl_dtype dtype : kDtypes) {
    const Pool pool(dtype, true);
    for (sl_reduce_op op : kOps) {
      if (!exists(dtype, op)) continue;
      for (int sources : {1, 2, 3, 4, 8}) {
        for (int target = 0; target < sources; ++target) {
          size_t count = random.pick<size_t>({5, 77, 1027, 4200}), shift = random.pick<size_t>({0, 1});
          Operands expected(dtype, op, sources, count, shift), got(dtype, op, sources, count, shift);
          uint64_t seed = static_cast<uint64_t>(random.integer(0, INT64_MAX));
          expected.fill(pool, seed), got.fill(pool, seed);
          sl_reduce_reference(&expected.args);
          got.args.out = got.in[static_cast<size_t>(target)].data();
          GetParam()->reduce(&got.args);
          ASSERT_TRUE(same_result(got.args, expected.out.data(), got.args.out)) << describe(got.args) << target;
          ASSERT_TRUE(got.intact()) << describe(got.args);
        }
      }
    }
  }
}

TEST_P(ReduceKernel, TakesTheSameBufferTwice) {
  for (sl_dtype dtype : kFloats) {
    Operands operands(dtype, SL_REDUCE_SUM, 4, 100, 0);
    for (int64_t i = 0; i < 100; ++i) store_number(dtype, operands.in[0].data(), i, static_cast<double>(i));
    operands.pointers.assign(4, operands.in[0].data());
    operands.args.out = operands.in[0].data();
    GetParam()->reduce(&operands.args);
    for (int64_t i = 0; i < 100; ++i) {
      Operands rounded(dtype, SL_REDUCE_SUM, 1, 1, 0);
      store_number(dtype, rounded.out.data(), 0, 4.0 * static_cast<double>(i));
      ASSERT_EQ(load_number(dtype, operands.in[0].data(), i), load_number(dtype, rounded.out.data(), 0));
    }
  }
}

TEST_P(ReduceKernel, CopiesStreaming) {
  std::vector<unsigned char> source(5000);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<unsigned char>(i * 7 + i / 256);
  for (size_t bytes : {0, 1, 2, 31, 32, 63, 64, 65, 127, 128, 129, 200, 1000, 4096, 4777}) {
    for (size_t shift : {0, 1, 4, 17, 32, 48, 63}) {
      for (size_t offset : {0, 3, 64}) {
        GuardedBuffer out(bytes, shift);
        GetParam()->copy_streaming(out.data(), source.data() + offset, bytes);
        ASSERT_TRUE(bytes == 0 || std::memcmp(out.data(), source.data() + offset, bytes) == 0) << bytes << " " << shift;
        ASSERT_TRUE(out.intact()) << bytes << " " << shift;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiers, ReduceKernel, testing::ValuesIn(runnable_kernels()),
                         [](const auto &tier) { return std::string(tier.param->name); });

// One element of the reference, from numbers to a number.
double reduced(sl_dtype dtype, sl_reduce_op op, const std::vector<double> &values, double factor = 0) {
  Operands operands(dtype, op, static_cast<int>(values.size()), 1, 0, factor);
  for (size_t i = 0; i < values.size(); ++i) store_number(dtype, operands.in[i].data(), 0, values[i]);
  sl_reduce_reference(&operands.args);
  return load_number(dtype, operands.out.data(), 0);
}

template <typename T>
T reduced(sl_dtype dtype, sl_reduce_op op, const std::vector<T> &values) {
  T out = 0;
  std::vector<const void *> in;
  for (const T &value : values) in.push_back(&value);
  sl_reduce_args args = {&out, in.data(), static_cast<int>(in.size()), 1, dtype, op, 0};
  sl_reduce_reference(&args);
  return out;
}

TEST(ReduceReference, AddsInTheOrderOfTheSources) {
  EXPECT_EQ(reduced(SL_F32, SL_REDUCE_SUM, {1e8, 1, -1e8}), 0);
  EXPECT_EQ(reduced(SL_F32, SL_REDUCE_SUM, {1e8, -1e8, 1}), 1);
  EXPECT_EQ(reduced(SL_F64, SL_REDUCE_SUM, {1e8, 1, -1e8}), 1);
  EXPECT_EQ(reduced(SL_F32, SL_REDUCE_PRODUCT, {3, -5, 0.5}), -7.5);
}

TEST(ReduceReference, RoundsHalfPrecisionOnce) {
  // bfloat16 has 8 bits: 256 + 1 would stay 256 twice over, and 258 is what 256 + 1 + 1 is.
  EXPECT_EQ(reduced(SL_BF16, SL_REDUCE_SUM, {256, 1, 1}), 258);
  EXPECT_EQ(reduced(SL_F16, SL_REDUCE_SUM, {2048, 1, 1}), 2050);
  EXPECT_EQ(reduced(SL_BF16, SL_REDUCE_SUM, {256, 1}), 256);  // half way: to even
  EXPECT_EQ(reduced(SL_BF16, SL_REDUCE_SUM, {258, 1}), 260);
  EXPECT_EQ(reduced(SL_F16, SL_REDUCE_SUM, {65504, 65504, -65504}), 65504);  // no infinity on the way
  EXPECT_EQ(reduced(SL_F16, SL_REDUCE_SUM, {65504, 65504}), INFINITY);
}

TEST(ReduceReference, DividesAndMultiplies) {
  EXPECT_EQ(reduced(SL_F32, SL_REDUCE_AVG, {1, 2, 2}), static_cast<double>(5.0f / 3.0f));
  EXPECT_EQ(reduced(SL_F32, SL_REDUCE_PREMUL_SUM, {3, 5}, 0.1), static_cast<double>(3 * 0.1f + 5 * 0.1f));
  EXPECT_EQ(reduced(SL_F64, SL_REDUCE_PREMUL_SUM, {3, 5}, 0.1), 3 * 0.1 + 5 * 0.1);
  EXPECT_EQ(reduced(SL_BF16, SL_REDUCE_PREMUL_SUM, {256, 256}, 0.5), 256);
  // Rounded between product and sum: fused, the square of the error of 1 / 3 would be left over.
  double third = static_cast<double>(1.0f / 3.0f);
  EXPECT_EQ(reduced(SL_F32, SL_REDUCE_PREMUL_SUM, {-1, 3}, third), static_cast<double>(-1.0f / 3.0f + 1.0f));
}

TEST(ReduceReference, KeepsNaNAndTheFirstOfEqualZeros) {
  for (sl_dtype dtype : kFloats) {
    for (sl_reduce_op op : {SL_REDUCE_MIN, SL_REDUCE_MAX, SL_REDUCE_SUM, SL_REDUCE_PRODUCT, SL_REDUCE_AVG}) {
      EXPECT_TRUE(std::isnan(reduced(dtype, op, {NAN, 1})));
      EXPECT_TRUE(std::isnan(reduced(dtype, op, {1, NAN})));
      EXPECT_TRUE(std::isnan(reduced(dtype, op, {1, NAN, 2})));
    }
    EXPECT_EQ(reduced(dtype, SL_REDUCE_MIN, {3, -2, 5}), -2);
    EXPECT_EQ(reduced(dtype, SL_REDUCE_MAX, {3, -2, 5}), 5);
    for (sl_reduce_op op : {SL_REDUCE_MIN, SL_REDUCE_MAX}) {
      EXPECT_FALSE(std::signbit(reduced(dtype, op, {0.0, -0.0})));
      EXPECT_TRUE(std::signbit(reduced(dtype, op, {-0.0, 0.0})));
    }
    EXPECT_TRUE(std::signbit(reduced(dtype, SL_REDUCE_SUM, {-0.0, -0.0})));
  }
}

TEST(ReduceReference, WrapsIntegersAround) {
  EXPECT_EQ(reduced<int8_t>(SL_I8, SL_REDUCE_SUM, {127, 1}), -128);
  EXPECT_EQ(reduced<uint8_t>(SL_U8, SL_REDUCE_SUM, {255, 3}), 2);
  EXPECT_EQ(reduced<int16_t>(SL_I16, SL_REDUCE_PRODUCT, {-32768, -1}), -32768);
  EXPECT_EQ(reduced<int32_t>(SL_I32, SL_REDUCE_PRODUCT, {65536, 65536, 5}), 0);
  EXPECT_EQ(reduced<int64_t>(SL_I64, SL_REDUCE_SUM, {INT64_MAX, 1}), INT64_MIN);
  EXPECT_EQ(reduced<int32_t>(SL_I32, SL_REDUCE_AVG, {-3, -4}), -3);
  EXPECT_EQ(reduced<int32_t>(SL_I32, SL_REDUCE_AVG, {3, 4}), 3);
  EXPECT_EQ(reduced<int8_t>(SL_I8, SL_REDUCE_AVG, {127, 1}), -64);
  EXPECT_EQ(reduced<uint8_t>(SL_U8, SL_REDUCE_MAX, {200, 100}), 200);
  EXPECT_EQ(reduced<int8_t>(SL_I8, SL_REDUCE_MIN, {-56, 100}), -56);
  EXPECT_EQ(reduced<int16_t>(SL_I16, SL_REDUCE_BAND, {0x0ff0, 0x00ff}), 0x00f0);
  EXPECT_EQ(reduced<int16_t>(SL_I16, SL_REDUCE_BOR, {0x0ff0, 0x00ff}), 0x0fff);
  EXPECT_EQ(reduced<int64_t>(SL_I64, SL_REDUCE_BXOR, {0x0ff0, 0x00ff}), 0x0f0f);
}

TEST(ReduceReference, TakesAnyByteForTrue) {
  for (sl_reduce_op op : {SL_REDUCE_SUM, SL_REDUCE_MAX, SL_REDUCE_BOR}) {
    EXPECT_EQ(reduced<uint8_t>(SL_BOOL, op, {2, 0, 128}), 1);
    EXPECT_EQ(reduced<uint8_t>(SL_BOOL, op, {0, 0}), 0);
  }
  for (sl_reduce_op op : {SL_REDUCE_PRODUCT, SL_REDUCE_MIN, SL_REDUCE_BAND}) {
    EXPECT_EQ(reduced<uint8_t>(SL_BOOL, op, {2, 1, 128}), 1);
    EXPECT_EQ(reduced<uint8_t>(SL_BOOL, op, {2, 0, 1}), 0);
  }
  EXPECT_EQ(reduced<uint8_t>(SL_BOOL, SL_REDUCE_BXOR, {2, 1}), 0);
  EXPECT_EQ(reduced<uint8_t>(SL_BOOL, SL_REDUCE_BXOR, {2, 0, 4, 255}), 1);
  EXPECT_EQ(reduced<uint8_t>(SL_BOOL, SL_REDUCE_SUM, {64}), 1);
}

TEST(Reduce, DispatchIsCapped) {
  for (const sl_reduce_kernel *kernel : runnable_kernels()) {
    ASSERT_EQ(sl_cpu_cap(kernel->isa), SL_OK);
    EXPECT_EQ(sl_reduce_find_kernel(), kernel);
    Operands operands(SL_BF16, SL_REDUCE_SUM, 2, 1000, 0), expected(SL_BF16, SL_REDUCE_SUM, 2, 1000, 0);
    const Pool pool(SL_BF16, false);
    operands.fill(pool, 1), expected.fill(pool, 1);
    sl_reduce(&operands.args), sl_reduce_reference(&expected.args);
    EXPECT_TRUE(same_result(operands.args, expected.out.data(), operands.out.data())) << kernel->name;
    GuardedBuffer copy(2000);
    sl_copy_streaming(copy.data(), operands.out.data(), 2000);
    EXPECT_EQ(std::memcmp(copy.data(), operands.out.data(), 2000), 0) << kernel->name;
  }
  sl_copy_streaming(nullptr, nullptr, 0);
  ASSERT_EQ(sl_cpu_cap(sl_cpu_detect()), SL_OK);
}

TEST(Reduce, WhatDoesNotExistIsRefused) {
  const struct {
    sl_dtype dtype;
    sl_reduce_op op;
    double factor;
    sl_status status;
    const char *message;
  } bad[] = {
      {SL_F32, SL_REDUCE_BAND, 0, SL_UNSUPPORTED,
       "op is band and dtype float32, expected integers or bool for this op"},
      {SL_F16, SL_REDUCE_BOR, 0, SL_UNSUPPORTED, "op is bor and dtype float16, expected integers or bool for this op"},
      {SL_F64, SL_REDUCE_BXOR, 0, SL_UNSUPPORTED,
       "op is bxor and dtype float64, expected integers or bool for this op"},
      {SL_BOOL, SL_REDUCE_AVG, 0, SL_UNSUPPORTED, "op is avg and dtype bool, expected numbers for this op"},
      {SL_I32, SL_REDUCE_PREMUL_SUM, 2, SL_UNSUPPORTED,
       "op is premul_sum and dtype int32, expected float32, bfloat16, float16 or float64 for this op"},
      {SL_F32, SL_REDUCE_PREMUL_SUM, 1e39, SL_INVALID_ARGUMENT,
       "factor is 1e+39, expected a number that is finite in float32"},
      {SL_BF16, SL_REDUCE_PREMUL_SUM, NAN, SL_INVALID_ARGUMENT,
       "factor is nan, expected a number that is finite in float32"},
      {SL_F64, SL_REDUCE_PREMUL_SUM, -INFINITY, SL_INVALID_ARGUMENT,
       "factor is -inf, expected a number that is finite in float64"},
      {static_cast<sl_dtype>(10), SL_REDUCE_SUM, 0, SL_INVALID_ARGUMENT,
       "dtype is 10, expected one of sl_dtype, 0 to 9"},
      {SL_F32, static_cast<sl_reduce_op>(9), 0, SL_INVALID_ARGUMENT, "op is 9, expected one of sl_reduce_op, 0 to 8"},
  };
  for (const auto &call : bad) {
    EXPECT_EQ(sl_reduce_validate(call.dtype, call.op, call.factor), call.status) << call.message;
    EXPECT_STREQ(sl_last_error(), call.message);
  }
  EXPECT_EQ(sl_reduce_validate(SL_F64, SL_REDUCE_PREMUL_SUM, 1e39), SL_OK);
  EXPECT_EQ(sl_reduce_validate(SL_F32, SL_REDUCE_SUM, NAN), SL_OK);  // not read
  int existing = 0;
  for (sl_dtype dtype : kDtypes) {
    for (sl_reduce_op op : kOps) existing += exists(dtype, op);
  }
  EXPECT_EQ(existing, 4 * 6 + 5 * 8 + 7);
}

}  // namespace
}  // namespace sluice_test

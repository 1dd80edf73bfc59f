// linear_dynamic on every tier against the reference, between canaries: odd sizes, both weight widths, every policy,
// outliers, values at which 16-bit sums would saturate, and rows that aren't finite.
#include "quantize_problem.h"

namespace sluice_test {
namespace {

struct Case {
  int64_t rows, inputs, outputs;
  int weight_bits = 8;
  int64_t group_size = 0;
  int activation_bits = 8;
  bool per_token = true;
  double outlier_ratio = 0;
  sl_dtype dtype = SL_F32;
  Fill x = [](Random &random) { return random.normal(); };
  Fill w = [](Random &random) { return random.normal(); };

  std::string text() const {
    std::ostringstream out;
    out << rows << " x " << inputs << " x " << outputs << ", weight " << weight_bits << "/" << group_size << ", bits "
        << activation_bits << (per_token ? " token" : " tensor") << " outliers " << outlier_ratio << " "
        << sl_dtype_name(dtype);
    return out.str();
  }
};

struct Result {
  GuardedBuffer out, bits;
};

class QuantizeLinear : public testing::TestWithParam<sl_isa> {
 protected:
  IsaCap cap_{GetParam()};

  static sl_linear_dynamic_args make_args(const Case &shape, const Weight &weight, const GuardedBuffer &x,
                                          const GuardedBuffer &bias, Result &result) {
    size_t size = sl_dtype_size(shape.dtype);
    result.out = GuardedBuffer(static_cast<size_t>(shape.rows * shape.outputs) * size, size);
    result.bits = GuardedBuffer(static_cast<size_t>(shape.rows), 1);
    sl_linear_dynamic_args args{};
    args.rows = shape.rows, args.weight = weight.sizes, args.dtype = shape.dtype, args.x = x.data();
    args.bias = static_cast<const float *>(bias.data());
    args.activation_bits = shape.activation_bits, args.target_sqnr = 30, args.per_token = shape.per_token;
    args.outlier_ratio = shape.outlier_ratio;
    args.out = result.out.data(), args.bits = static_cast<int8_t *>(result.bits.data());
    return args;
  }

  static void check(const Case &shape, uint64_t seed, int threads = 1) {
    Random random(seed);
    Weight weight(shape.outputs, shape.inputs, shape.weight_bits, shape.group_size, 1, shape.w, random);
    GuardedBuffer x = make_values(shape.dtype, shape.rows * shape.inputs, shape.x, random, seed % 2);
    GuardedBuffer bias = make_values(SL_F32, shape.outputs, [](Random &r) { return r.normal(); }, random, true);
    Result got, wanted;
    ThreadExecutor executor(threads);
    sl_linear_dynamic_args args = make_args(shape, weight, x, bias, wanted);
    ASSERT_EQ(run_guarded(args, sl_linear_dynamic_workspace_size, sl_linear_dynamic_reference), SL_OK)
        << sl_last_error();
    args = make_args(shape, weight, x, bias, got);
    args.executor = executor.get();
    ASSERT_EQ(run_guarded(args, sl_linear_dynamic_workspace_size, sl_linear_dynamic), SL_OK) << sl_last_error();
    for (int64_t i = 0; i < shape.rows; ++i) {
      ASSERT_EQ(static_cast<int8_t *>(got.bits.data())[i], static_cast<int8_t *>(wanted.bits.data())[i])
          << shape.text() << " row " << i;
    }
    expect_close(shape.dtype, got.out, wanted.out, shape.rows * shape.outputs, shape.text());
    ASSERT_TRUE(got.out.intact() && got.bits.intact() && x.intact() && bias.intact() && weight.intact());
  }
};

TEST_P(QuantizeLinear, NoInputs) {
  for (bool per_token : {true, false}) {
    for (int bits : {SL_BITS_BY_SQNR, SL_BITS_BY_AMAX, 8, 16}) check({3, 0, 17, 8, 0, bits, per_token}, 1);
  }
}

TEST_P(QuantizeLinear, OddSizes) {
  uint64_t seed = 1;
  for (int64_t inputs : {1, 3, 7, 8, 9, 31, 33, 70, 515, 1100}) {
    for (int64_t outputs : {1, 15, 16, 17, 50}) {
      for (int bits : {8, 4}) {
        int64_t rows = 1 + static_cast<int64_t>(++seed) % 9;
        check({rows, inputs, outputs, bits, seed % 3 == 0 ? 32 : 0, seed % 4 == 0 ? 16 : 8}, seed);
      }
    }
  }
}

TEST_P(QuantizeLinear, AnyNumberOfRows) {
  uint64_t seed = 100;
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 19, 97, 200}) {
    for (int bits : {8, 4}) check({rows, 72, 20, bits, bits == 4 ? 64 : 0, 0}, ++seed, 3);
  }
}

TEST_P(QuantizeLinear, EveryWidthPolicyDtypeAndGroup) {
  uint64_t seed = 200;
  for (int activation_bits : {4, 7, 8, 16, 0, -1}) {
    for (bool per_token : {true, false}) {
      for (sl_dtype dtype : {SL_F32, SL_BF16, SL_F16}) {
        for (int weight_bits : {8, 4}) {
          Case shape{9, 200, 21, weight_bits, seed % 2 ? 96 : 0, activation_bits, per_token, 0, dtype};
          double spread = seed % 3 ? 1 : 0.01;
          shape.x = [spread](Random &r) { return r.normal(spread) * (r.chance(0.003) ? 30 : 1); };
          check(shape, ++seed);
        }
      }
    }
  }
}

TEST_P(QuantizeLinear, LongGroups) { check({5, 1500, 18, 8, 1024, 16}, 300), check({15, 1500, 18, 4, 1024, 8}, 301); }

// Every product at its largest, with all signs alike, alternating, and at random.
TEST_P(QuantizeLinear, NothingSaturates) {
  uint64_t seed = 400;
  auto alike = [](Random &) { return 1.0; };
  auto negative = [](Random &) { return -1.0; };
  auto mixed = [](Random &r) { return r.chance(0.5) ? 1.0 : -1.0; };
  for (int activation_bits : {4, 7, 8, 16}) {
    for (int weight_bits : {8, 4}) {
      for (int64_t rows : {2, 20}) {
        for (const Fill &x : {Fill(alike), Fill(negative), Fill(mixed)}) {
          for (const Fill &w : {Fill(alike), Fill(negative), Fill(mixed)}) {
            Case shape{rows, 576, 16, weight_bits, 0, activation_bits};
            shape.x = x, shape.w = w;
            check(shape, ++seed);
          }
        }
      }
    }
  }
}

// 16-bit activations split into a high byte and a low byte of -128.
TEST_P(QuantizeLinear, TheLowByteAtItsEnd) {
  for (int weight_bits : {8, 4}) {
    for (double low : {-128.0, 127.0}) {
      Case shape{3, 256, 16, weight_bits, 0, 16};
      int64_t i = 0;
      shape.x = [low, i](Random &) mutable { return i++ % 64 == 0 ? 32639.0 : 256 * 3 + low; };
      shape.w = [](Random &) { return 1.0; };
      check(shape, 500);
    }
  }
}

TEST_P(QuantizeLinear, OutlierChannels) {
  uint64_t seed = 600;
  for (int64_t outliers : {1, 3, 40}) {  // the last are too many to be taken out
    for (int64_t rows : {1, 11}) {
      for (bool per_token : {true, false}) {
        for (int weight_bits : {8, 4}) {
          for (sl_dtype dtype : {SL_F32, SL_BF16}) {
            Case shape{rows, 130, 35, weight_bits, 64, 0, per_token, 6, dtype};
            int64_t i = 0;
            shape.x = [i, outliers](Random &r) mutable {
              return r.normal() * ((i++ % 130) * 7 % 130 < outliers ? 60 : 1);
            };
            check(shape, ++seed, 2);
          }
        }
      }
    }
  }
}

// Whole numbers, so that channels reach the same, and the limit itself: 3 times a usual 2 is no outlier, 7 is one.
TEST_P(QuantizeLinear, OutlierChannelsAtTheLimit) {
  uint64_t seed = 650;
  for (int64_t inputs : {1, 2, 31, 64, 130}) {
    for (double usual : {0.0, 2.0}) {
      for (double largest : {6.0, 7.0}) {
        for (int64_t outliers : {1, 2, 4, 5}) {
          Case shape{2, inputs, 17, 8, 0, 0, true, 3};
          int64_t i = 0;
          shape.x = [=](Random &) mutable {
            int64_t channel = i++ % inputs;
            return (channel % 2 ? -1 : 1) * (channel < outliers ? largest : usual);
          };
          check(shape, ++seed);
        }
      }
    }
  }
}

TEST_P(QuantizeLinear, RowsThatAreNotFiniteAreNaNAndLeaveTheOthersAlone) {
  uint64_t seed = 700;
  for (double bad : {static_cast<double>(INFINITY), -static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    for (bool per_token : {true, false}) {
      for (int weight_bits : {8, 4}) {
        Case shape{6, 90, 17, weight_bits, 0, 0, per_token, 10};
        int64_t i = 0;
        shape.x = [i, bad](Random &r) mutable { return i++ == 2 * 90 + 5 ? bad : r.normal(); };
        check(shape, ++seed);
      }
    }
  }
}

TEST_P(QuantizeLinear, TinyHugeAndZeroValues) {
  uint64_t seed = 800;
  for (double size : {0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38}) {
    for (int bits : {0, 8, 16}) {
      Case shape{4, 40, 16, 8, 0, bits};
      shape.x = [size](Random &r) { return r.uniform(-1, 1) * size; };
      shape.w = [](Random &r) { return r.uniform(-1, 1) * 1e-3; };
      check(shape, ++seed);
    }
  }
}

TEST_P(QuantizeLinear, EmptySizes) {
  check({0, 5, 7}, 900), check({3, 0, 7}, 901), check({3, 5, 0}, 902), check({1, 1, 1}, 903);
}

TEST_P(QuantizeLinear, TheSameBitsWithAnyNumberOfThreads) {
  Random random(5);
  Case shape{70, 260, 90, 4, 64, 0, false, 8};
  shape.x = [](Random &r) { return r.normal() * (r.chance(0.001) ? 100 : 1); };
  Weight weight(shape.outputs, shape.inputs, 4, 64, 1, shape.w, random);
  GuardedBuffer x = make_values(SL_F32, 70 * 260, shape.x, random), bias = make_values(SL_F32, 90, shape.w, random);
  Result first;
  for (int threads : {1, 2, 3, 8}) {
    ThreadExecutor executor(threads);
    Result again;
    sl_linear_dynamic_args args = make_args(shape, weight, x, bias, again);
    args.executor = executor.get();
    ASSERT_EQ(run_guarded(args, sl_linear_dynamic_workspace_size, sl_linear_dynamic), SL_OK) << sl_last_error();
    if (threads > 1) {
      ASSERT_EQ(std::memcmp(first.out.data(), again.out.data(), again.out.size()), 0) << threads << " threads";
    } else {
      first = std::move(again);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiers, QuantizeLinear, testing::ValuesIn(quantize_tiers()),
                         [](const auto &tier) { return std::string(sl_isa_name(tier.param)); });

}  // namespace
}  // namespace sluice_test

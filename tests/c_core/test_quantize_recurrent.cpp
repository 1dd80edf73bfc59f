// lstm_dynamic and gru_dynamic on every tier against the formula in double, between canaries. The state that is
// observed in out is what each step of the formula starts from: a rounding that goes the other way would be fed back.
#include <sluice/quantize_recurrent.h>

#include "quantize_problem.h"

namespace sluice_test {
namespace {

struct Case {
  int gates;  // 4: LSTM, 3: GRU
  int64_t steps, batch, inputs, hidden;
  std::vector<int64_t> batch_sizes{};
  bool reverse = false;
  int64_t projected = 0;
  int weight_bits = 8;
  int64_t group_size = 0;
  int activation_bits = 8, state_bits = 8;
  double outlier_ratio = 0;
  sl_dtype dtype = SL_F32;
  bool biases = true;
  int threads = 1;
  Fill x = [](Random &random) { return random.normal(); };
  Fill state = [](Random &random) { return random.normal(); };

  int64_t rows() const {
    int64_t total = 0;
    for (int64_t step = 0; step < steps; ++step) total += rows_of(step);
    return total;
  }
  int64_t rows_of(int64_t step) const { return batch_sizes.empty() ? batch : batch_sizes[static_cast<size_t>(step)]; }
  int64_t state_size() const { return projected ? projected : hidden; }
  std::string text() const {
    std::ostringstream out;
    out << (gates == 4 ? "LSTM " : "GRU ") << steps << " steps, " << batch << " sequences"
        << (batch_sizes.empty() ? "" : " of unequal length") << ", " << inputs << " -> " << hidden << " -> "
        << projected << (reverse ? " reverse" : "") << ", weight " << weight_bits << "/" << group_size << ", bits "
        << activation_bits << " " << state_bits << " " << sl_dtype_name(dtype) << ", " << threads << " threads";
    return out.str();
  }
};

using Values = std::vector<float>;

Values read_values(sl_dtype dtype, const GuardedBuffer &buffer, int64_t count) {
  Values values;
  for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<float>(load_number(dtype, buffer.data(), i)));
  return values;
}

struct Product {
  Values out;
  std::vector<int8_t> bits;
};

// linear_dynamic's specification, on float32 values.
Product multiply(const Values &x, int64_t rows, const Weight &weight, const float *bias, int bits, double ratio) {
  Product product{Values(static_cast<size_t>(rows * weight.sizes.out_features)),
                  std::vector<int8_t>(static_cast<size_t>(rows))};
  sl_linear_dynamic_args args{};
  args.rows = rows, args.weight = weight.sizes, args.dtype = SL_F32, args.x = x.data(), args.bias = bias;
  args.activation_bits = bits, args.target_sqnr = 30, args.per_token = true, args.outlier_ratio = ratio;
  args.out = product.out.data(), args.bits = product.bits.data();
  EXPECT_EQ(run_guarded(args, sl_linear_dynamic_workspace_size, sl_linear_dynamic_reference), SL_OK) << sl_last_error();
  return product;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Problem {
  Case shape;
  Random random;
  Weight input, hidden, projection;
  GuardedBuffer x, h0, c0, input_bias, hidden_bias, out, hn, cn, bits;
  int64_t matrices;

  Problem(const Case &with, uint64_t seed)
      : shape(with),
        random(seed),
        input(make_weight(with.gates * with.hidden, with.inputs)),
        hidden(make_weight(with.gates * with.hidden, with.state_size())),
        projection(make_weight(with.projected, with.hidden)),
        matrices(with.projected ? 3 : 2) {
    int64_t outputs = shape.gates * shape.hidden, rows = shape.rows(), state = shape.state_size();
    auto normal = [](Random &r) { return r.normal(); };
    x = make_values(shape.dtype, rows * shape.inputs, shape.x, random, seed % 2);
    h0 = make_values(shape.dtype, shape.batch * state, shape.state, random, true);
    c0 = make_values(shape.dtype, shape.batch * shape.hidden, shape.state, random, true);
    input_bias = make_values(SL_F32, outputs, normal, random, true);
    hidden_bias = make_values(SL_F32, outputs, normal, random, true);
    size_t size = sl_dtype_size(shape.dtype);
    out = GuardedBuffer(static_cast<size_t>(rows * state) * size, size);
    hn = GuardedBuffer(static_cast<size_t>(shape.batch * state) * size, size);
    cn = GuardedBuffer(static_cast<size_t>(shape.batch * shape.hidden) * size, size);
    bits = GuardedBuffer(static_cast<size_t>(matrices * rows), 1);
  }

  // Small enough for gates that are not all saturated.
  Weight make_weight(int64_t outputs, int64_t inputs) {
    double spread = 1 / std::sqrt(static_cast<double>(inputs) + 1);
    auto next = [spread](Random &r) { return r.normal(spread); };
    return Weight(outputs, inputs, shape.weight_bits, shape.group_size, 1, next, random);
  }

  sl_recurrent_dynamic_args args() {
    sl_recurrent_dynamic_args args{};
    args.steps = shape.steps, args.batch = shape.batch, args.rows = shape.rows();
    args.batch_sizes = shape.batch_sizes.empty() ? nullptr : shape.batch_sizes.data();
    args.hidden_size = shape.hidden, args.input = input.sizes, args.hidden = hidden.sizes;
    args.project = shape.projected > 0, args.projection = projection.sizes;
    args.dtype = shape.dtype, args.x = x.data(), args.h0 = h0.data(), args.c0 = c0.data();
    if (shape.biases) {
      args.input_bias = static_cast<const float *>(input_bias.data());
      args.hidden_bias = static_cast<const float *>(hidden_bias.data());
    }
    args.reverse = shape.reverse, args.activation_bits = shape.activation_bits, args.state_bits = shape.state_bits;
    args.target_sqnr = 30, args.outlier_ratio = shape.outlier_ratio;
    args.out = out.data(), args.hn = hn.data(), args.cn = cn.data();
    args.bits = static_cast<int8_t *>(bits.data());
    return args;
  }

  void run() {
    ThreadExecutor executor(shape.threads);
    sl_recurrent_dynamic_args call = args();
    call.executor = executor.get();
    sl_status status = shape.gates == 4 ? run_guarded(call, sl_lstm_dynamic_workspace_size, sl_lstm_dynamic)
                                        : run_guarded(call, sl_gru_dynamic_workspace_size, sl_gru_dynamic);
    ASSERT_EQ(status, SL_OK) << sl_last_error();
    ASSERT_TRUE(out.intact() && hn.intact() && cn.intact() && bits.intact() && x.intact() && h0.intact());
    ASSERT_TRUE(c0.intact() && input.intact() && hidden.intact() && projection.intact());
  }
};

class QuantizeRecurrent : public testing::TestWithParam<sl_isa> {
 protected:
  IsaCap cap_{GetParam()};

  static void expect_value(double got, double wanted, double tolerance, const std::string &where) {
    if (std::isnan(wanted)) {
      ASSERT_TRUE(std::isnan(got)) << where << " is " << got << ", expected NaN";
    } else {
      ASSERT_LE(std::fabs(got - wanted), tolerance * (1 + std::fabs(wanted)))
          << where << " is " << got << ", expected " << wanted;
    }
  }

  static void check(const Case &shape, uint64_t seed) {
    Problem problem(shape, seed);
    problem.run();
    if (HasFatalFailure()) return;
    int64_t rows = shape.rows(), state = shape.state_size(), size = shape.hidden;
    auto input_args = problem.args();
    Product a = multiply(read_values(shape.dtype, problem.x, rows * shape.inputs), rows, problem.input,
                         input_args.input_bias, shape.activation_bits, shape.outlier_ratio);
    Values h = read_values(shape.dtype, problem.h0, shape.batch * state);
    Values c0 = read_values(shape.dtype, problem.c0, shape.batch * size);
    std::vector<double> c(c0.begin(), c0.end());
    Values got = read_values(shape.dtype, problem.out, rows * state);
    const auto *bits = static_cast<const int8_t *>(problem.bits.data());
    // What is rounded to an integer is known to some 1e-7 only in a projection, and to out's dtype in out: one step of
    // 16 bits then, or of the dtype.
    bool observed = shape.dtype == SL_F32;
    double tolerance = !observed ? (shape.dtype == SL_BF16 ? 0x1p-6 : 0x1p-9) : shape.projected ? 2e-4 : 1e-5;

    std::vector<int64_t> offsets(1, 0);
    for (int64_t step = 0; step < shape.steps; ++step) offsets.push_back(offsets.back() + shape.rows_of(step));
    for (int64_t round = 0; round < shape.steps; ++round) {
      int64_t step = shape.reverse ? shape.steps - 1 - round : round, count = shape.rows_of(step);
      int64_t first = offsets[static_cast<size_t>(step)];
      Values active(h.begin(), h.begin() + count * state);
      Product b = multiply(active, count, problem.hidden, input_args.hidden_bias, shape.state_bits, 0);
      Values unprojected(static_cast<size_t>(count * size));
      for (int64_t row = 0; row < count; ++row) {
        auto gate = [&](const Product &product, int64_t of, int64_t number, int64_t i) {
          return static_cast<double>(product.out[static_cast<size_t>((of * shape.gates + number) * size + i)]);
        };
        for (int64_t i = 0; i < size; ++i) {
          auto sum = [&](int64_t number) { return gate(a, first + row, number, i) + gate(b, row, number, i); };
          auto at = static_cast<size_t>(row * size + i);
          if (shape.gates == 4) {
            c[at] = sigmoid(sum(1)) * c[at] + sigmoid(sum(0)) * std::tanh(sum(2));
            unprojected[at] = static_cast<float>(sigmoid(sum(3)) * std::tanh(c[at]));
          } else {
            double reset = sigmoid(sum(0)), update = sigmoid(sum(1));
            double value = std::tanh(gate(a, first + row, 2, i) + reset * gate(b, row, 2, i));
            unprojected[at] = static_cast<float>((1 - update) * value + update * static_cast<double>(h[at]));
          }
        }
      }
      Product next{unprojected, {}};
      if (shape.projected) next = multiply(unprojected, count, problem.projection, nullptr, shape.state_bits, 0);
      for (int64_t row = 0; row < count; ++row) {
        std::string where = shape.text() + ", step " + std::to_string(step) + " row " + std::to_string(row);
        ASSERT_EQ(bits[first + row], a.bits[static_cast<size_t>(first + row)]) << where;
        if (observed) {
          ASSERT_EQ(bits[rows + first + row], b.bits[static_cast<size_t>(row)]) << where;
        }
        if (shape.projected) {
          ASSERT_EQ(bits[2 * rows + first + row], next.bits[static_cast<size_t>(row)]) << where;
        }
        for (int64_t i = 0; i < state; ++i) {
          auto from = static_cast<size_t>((first + row) * state + i), to = static_cast<size_t>(row * state + i);
          expect_value(static_cast<double>(got[from]), static_cast<double>(next.out[to]), tolerance, where);
          if (HasFatalFailure()) return;
          h[to] = observed ? got[from] : next.out[to];
        }
      }
    }
    Values hn = read_values(shape.dtype, problem.hn, shape.batch * state);
    for (size_t i = 0; i < hn.size(); ++i) {
      expect_value(static_cast<double>(hn[i]), static_cast<double>(h[i]), observed ? 0 : tolerance,
                   shape.text() + ", hn " + std::to_string(i));
    }
    Values cn = read_values(shape.dtype, problem.cn, shape.gates == 4 ? shape.batch * size : 0);
    for (size_t i = 0; i < cn.size(); ++i) {
      expect_value(static_cast<double>(cn[i]), c[i], tolerance, shape.text() + ", cn " + std::to_string(i));
    }
  }
};

TEST_P(QuantizeRecurrent, OddSizes) {
  uint64_t seed = 1;
  for (int gates : {3, 4}) {
    for (int64_t inputs : {1, 9, 70}) {
      for (int64_t hidden : {1, 5, 16, 33, 130}) {
        int64_t batch = 1 + static_cast<int64_t>(++seed) % 7;
        Case shape{gates, 5, batch, inputs, hidden};
        shape.reverse = seed % 2, shape.biases = seed % 3;
        check(shape, seed);
      }
    }
  }
}

TEST_P(QuantizeRecurrent, SequencesOfUnequalLength) {
  uint64_t seed = 100;
  for (int gates : {3, 4}) {
    for (bool reverse : {false, true}) {
      for (const auto &sizes : std::vector<std::vector<int64_t>>{{1}, {9, 9, 6, 6, 1}, {3, 2, 1, 1}, {14, 13}}) {
        Case shape{gates, static_cast<int64_t>(sizes.size()), sizes[0], 20, 24, sizes, reverse};
        check(shape, ++seed);
        shape.batch += 2;  // sequences without a row keep their state
        check(shape, ++seed);
      }
    }
  }
}

TEST_P(QuantizeRecurrent, EveryWidthDtypeAndWeight) {
  uint64_t seed = 200;
  for (int gates : {3, 4}) {
    for (int bits : {4, 7, 8, 16, 0, -1}) {
      for (int weight_bits : {8, 4}) {
        Case shape{gates, 4, 5, 40, 72};
        shape.weight_bits = weight_bits, shape.group_size = weight_bits == 4 ? 32 : 0;
        shape.activation_bits = bits, shape.state_bits = bits;
        check(shape, ++seed);
      }
    }
    for (sl_dtype dtype : {SL_BF16, SL_F16}) {
      Case shape{gates, 6, 3, 40, 30};
      shape.dtype = dtype, shape.activation_bits = 8, shape.state_bits = 16;
      check(shape, ++seed);
    }
  }
}

TEST_P(QuantizeRecurrent, OutlierChannelsOfTheInput) {
  uint64_t seed = 250;
  for (int gates : {3, 4}) {
    Case shape{gates, 4, 3, 70, 20};
    int64_t i = 0;
    shape.x = [i](Random &r) mutable { return r.normal() * (i++ % 70 == 11 ? 60 : 1); };
    shape.outlier_ratio = 6;
    check(shape, ++seed);
  }
}

TEST_P(QuantizeRecurrent, Projections) {
  uint64_t seed = 300;
  for (bool reverse : {false, true}) {
    for (int64_t projected : {1, 10, 16, 50}) {
      Case shape{4, 4, 4, 12, 33, {4, 4, 2, 1}, reverse, projected};
      shape.state_bits = 16;
      check(shape, ++seed);
    }
  }
}

TEST_P(QuantizeRecurrent, ManyThreads) {
  uint64_t seed = 400;
  for (int gates : {3, 4}) {
    Case shape{gates, 6, 11, 30, 200, {11, 11, 10, 7, 2, 1}};  // enough for the steps to run on several threads
    for (int threads : {2, 3, 8}) {
      shape.threads = threads;
      check(shape, ++seed);
    }
  }
  Case shape{4, 3, 11, 30, 200, {}, false, 100};
  shape.threads = 4, shape.state_bits = 16;
  check(shape, ++seed);
}

TEST_P(QuantizeRecurrent, TheSameBitsWithAnyNumberOfThreads) {
  for (int gates : {3, 4}) {
    Case shape{gates, 7, 9, 60, 200};
    shape.activation_bits = 0, shape.state_bits = 0, shape.outlier_ratio = 8;
    Problem first(shape, 5);
    first.run();
    for (int threads : {2, 5}) {
      shape.threads = threads;
      Problem again(shape, 5);
      again.run();
      ASSERT_EQ(std::memcmp(first.out.data(), again.out.data(), again.out.size()), 0) << shape.text();
      ASSERT_EQ(std::memcmp(first.bits.data(), again.bits.data(), again.bits.size()), 0) << shape.text();
    }
  }
}

// One value of x, of h0 or of c0: its sequence is spoilt from there on, and no other by a bit.
TEST_P(QuantizeRecurrent, ASequenceThatIsNotFiniteLeavesTheOthersAlone) {
  for (int gates : {3, 4}) {
    for (double bad : {static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
      for (bool reverse : {false, true}) {
        Case shape{gates, 5, 4, 10, 20};
        shape.reverse = reverse, shape.activation_bits = 0, shape.state_bits = 0, shape.outlier_ratio = 10;
        Problem clean(shape, 7), spoilt(shape, 7);
        store_number(SL_F32, spoilt.x.data(), (2 * 4 + 1) * 10 + 3, bad);  // step 2, sequence 1
        clean.run(), spoilt.run();
        for (int64_t step = 0; step < 5; ++step) {
          for (int64_t row = 0; row < 4; ++row) {
            bool after = row == 1 && (reverse ? step <= 2 : step >= 2);
            for (int64_t i = 0; i < 20; ++i) {
              double a = load_number(SL_F32, clean.out.data(), (step * 4 + row) * 20 + i);
              double b = load_number(SL_F32, spoilt.out.data(), (step * 4 + row) * 20 + i);
              ASSERT_TRUE(after ? std::isnan(b) : a == b) << shape.text() << " step " << step << " row " << row;
            }
            int8_t width = static_cast<int8_t *>(spoilt.bits.data())[(5 + step) * 4 + row];
            ASSERT_EQ(width == 0, after && step != 2) << shape.text() << " step " << step << " row " << row;
          }
        }
      }
    }
    Case shape{gates, 3, 3, 5, 6};
    int64_t i = 0;
    shape.state = [i](Random &r) mutable { return i++ == 8 ? static_cast<double>(NAN) : r.normal(); };
    check(shape, 8);
  }
}

TEST_P(QuantizeRecurrent, ValuesAtTheEnds) {
  uint64_t seed = 500;
  for (int gates : {3, 4}) {
    for (double size : {0.0, 1e-30, 1e-4, 1e3, 1e30}) {
      Case shape{gates, 4, 2, 8, 12};
      shape.x = shape.state = [size](Random &r) { return r.uniform(-1, 1) * size; };
      shape.state_bits = 16, shape.biases = false;
      check(shape, ++seed);
    }
  }
}

TEST_P(QuantizeRecurrent, EmptySizes) {
  for (int gates : {3, 4}) {
    check({gates, 0, 3, 5, 6}, 600), check({gates, 3, 0, 5, 6}, 601);
    check({gates, 3, 2, 0, 6}, 602), check({gates, 3, 2, 5, 0}, 603);
  }
}

// The approximations, against the C library; NaN stays NaN.
TEST_P(QuantizeRecurrent, GatesAreThoseOfTheCLibrary) {
  const sl_quantize_kernel *kernel = sl_quantize_find_kernel();
  std::vector<float> points;
  for (float x = -100; x < 100; x += 0.0137F) points.push_back(x);
  for (float x = 1e-38F; x < 1e38F; x *= 1.7F) points.insert(points.end(), {x, -x});
  points.insert(points.end(), {0.0F, INFINITY, -INFINITY, NAN});
  auto size = static_cast<int64_t>(points.size());
  Values gates(points.size() * 4), zeros(points.size() * 4), cell(points.size()), out(points.size());
  // With in = .5, value = 0 and forget = .5: cell halves, and out is sigmoid(o) * tanh(cell).
  std::copy(points.begin(), points.end(), gates.begin() + 3 * size);
  std::copy(points.begin(), points.end(), cell.begin());
  kernel->lstm_gates(gates.data(), zeros.data(), size, cell.data(), out.data());
  for (size_t i = 0; i < points.size(); ++i) {
    double x = static_cast<double>(points[i]), wanted = sigmoid(x) * std::tanh(x / 2),
           got = static_cast<double>(out[i]);
    if (std::isnan(wanted)) {
      ASSERT_TRUE(std::isnan(got)) << x;
    } else {
      ASSERT_LE(std::fabs(got - wanted), 4e-7 * std::fabs(wanted) + 1e-37) << x;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiers, QuantizeRecurrent, testing::ValuesIn(quantize_tiers()),
                         [](const auto &tier) { return std::string(sl_isa_name(tier.param)); });

struct BadInput {
  const char *message;
  std::function<void(sl_recurrent_dynamic_args &)> spoil;
};

TEST(QuantizeRecurrentErrors, BadInputIsNamed) {
  Case shape{4, 3, 3, 8, 16, {3, 2, 1}};
  const int64_t growing[] = {2, 3, 1}, none[] = {3, 3, 0};
  const std::vector<BadInput> cases = {
      {"steps is -1, expected at least 0", [](auto &args) { args.steps = -1; }},
      {"batch is -2, expected at least 0", [](auto &args) { args.batch = -2; }},
      {"the input weight is [64, 8], expected [68, 8]", [](auto &args) { args.hidden_size = 17; }},
      {"the hidden weight is [64, 16], expected [64, 5]",
       [](auto &args) { args.project = true, args.projection = args.hidden, args.projection.out_features = 5; }},
      {"x has 7 rows, expected the sum of batch_sizes, 6", [](auto &args) { args.rows = 7; }},
      {"x has 6 rows, expected steps * batch, 3 * 3", [](auto &args) { args.batch_sizes = nullptr; }},
      {"batch_sizes[1] is 3, expected at least 1 and at most the one before, which is 2",
       [&](auto &args) { args.batch_sizes = growing; }},
      {"batch_sizes[2] is 0, expected at least 1 and at most the one before, which is 3",
       [&](auto &args) { args.batch_sizes = none; }},
      {"batch_sizes[0] is 3, expected at least 1 and at most the batch of h0, which is 2",
       [](auto &args) { args.batch = 2; }},
      {"activation_bits is 5, expected 4, 7, 8, 16", [](auto &args) { args.activation_bits = 5; }},
      {"state_bits is 9, expected 4, 7, 8, 16", [](auto &args) { args.state_bits = 9; }},
      {"outlier_ratio is -1, expected a number above 0", [](auto &args) { args.outlier_ratio = -1; }},
      {"x is float64, expected float32, bfloat16 or float16", [](auto &args) { args.dtype = SL_F64; }},
      {"c0 is NULL, expected data", [](auto &args) { args.c0 = nullptr; }},
      {"hn is NULL, expected data", [](auto &args) { args.hn = nullptr; }},
      {"bits is NULL, expected data", [](auto &args) { args.bits = nullptr; }},
  };
  for (const BadInput &bad : cases) {
    Problem problem(shape, 1);
    sl_recurrent_dynamic_args args = problem.args();
    bad.spoil(args);
    EXPECT_NE(run_guarded(args, sl_lstm_dynamic_workspace_size, sl_lstm_dynamic), SL_OK) << bad.message;
    EXPECT_NE(std::string(sl_last_error()).find(bad.message), std::string::npos)
        << sl_last_error() << ", expected " << bad.message;
  }
  Problem problem(shape, 1);
  sl_recurrent_dynamic_args args = problem.args();
  EXPECT_EQ(sl_lstm_dynamic(&args), SL_OUT_OF_MEMORY);
  EXPECT_NE(std::string(sl_last_error()).find("workspace_size is 0, expected at least"), std::string::npos);
  args.project = true;
  EXPECT_EQ(sl_gru_dynamic(&args), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "project is true, expected false for a GRU");
  EXPECT_EQ(sl_gru_dynamic(nullptr), SL_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace sluice_test

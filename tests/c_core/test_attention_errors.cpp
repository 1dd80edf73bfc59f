// Bad arguments of gated attention: each is refused with a message that names it, its value and what was expected.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "support.h"

using namespace sluice_test;

namespace {

using Change = std::function<void(sl_gated_attention_args &)>;
using Call = sl_status (*)(const sl_gated_attention_args *);

const Call kForward[] = {sl_gated_attention, sl_gated_attention_reference};
const Call kBackward[] = {sl_gated_attention_backward, sl_gated_attention_backward_reference};

AttentionShape plain_shape() {
  AttentionShape shape;
  shape.heads_q = 2, shape.heads_kv = 1, shape.causal = true, shape.key_range = {0, 4};
  return shape;
}

// The call fails with this status and text, and writes nothing.
void expect_failure(Call call, const Change &change, sl_status want, const std::string &text) {
  AttentionProblem problem(plain_shape(), 1);
  sl_gated_attention_args args = problem.args();
  size_t bytes = 0;
  ASSERT_EQ(sl_gated_attention_backward_workspace_size(&args, &bytes), SL_OK);
  GuardedBuffer workspace(bytes);
  args.workspace = workspace.data(), args.workspace_size = bytes;
  change(args);
  EXPECT_EQ(call(&args), want) << text;
  EXPECT_NE(std::string(sl_last_error()).find(text), std::string::npos)
      << "the message is '" << sl_last_error() << "', expected it to contain '" << text << "'";
  Tensor untouched(SL_F32, problem.out.shape());
  EXPECT_EQ(std::memcmp(problem.out.data(), untouched.data(), 2 * 4 * 8 * 4), 0);
}

void expect_failure_everywhere(const Change &change, sl_status want, const std::string &text) {
  for (Call call : kForward) expect_failure(call, change, want, text);
  for (Call call : kBackward) expect_failure(call, change, want, text);
  sl_gated_attention_args args = AttentionProblem(plain_shape(), 1).args();
  change(args);
  size_t bytes = 0;
  EXPECT_EQ(sl_gated_attention_workspace_size(&args, &bytes), want) << text;
  EXPECT_EQ(sl_gated_attention_backward_workspace_size(&args, &bytes), want) << text;
}

}  // namespace

TEST(AttentionErrors, Sizes) {
  struct Row {
    int64_t sl_gated_attention_args::*field;
    const char *name;
    int64_t least;
  } rows[] = {{&sl_gated_attention_args::batch, "batch", 0},
              {&sl_gated_attention_args::heads_q, "heads_q", 1},
              {&sl_gated_attention_args::heads_kv, "heads_kv", 1},
              {&sl_gated_attention_args::n_q, "n_q", 0},
              {&sl_gated_attention_args::n_k, "n_k", 0},
              {&sl_gated_attention_args::head_dim, "head_dim", 1},
              {&sl_gated_attention_args::head_dim_v, "head_dim_v", 1},
              {&sl_gated_attention_args::window, "window", 0},
              {&sl_gated_attention_args::sinks, "sinks", 0}};
  for (const Row &row : rows) {
    for (int64_t value : {row.least - 1, std::numeric_limits<int64_t>::min()}) {
      expect_failure_everywhere(
          [&](auto &args) { args.*row.field = value; }, SL_INVALID_ARGUMENT,
          std::string(row.name) + " is " + std::to_string(value) + ", expected at least " + std::to_string(row.least));
    }
  }
}

TEST(AttentionErrors, SizesThatNoIndexCanHold) {
  const int64_t huge = std::numeric_limits<int64_t>::max();
  for (auto [field, name] :
       {std::pair{&sl_gated_attention_args::batch, "batch"}, std::pair{&sl_gated_attention_args::heads_q, "heads_q"},
        std::pair{&sl_gated_attention_args::n_q, "n_q"}, std::pair{&sl_gated_attention_args::n_k, "n_k"}}) {
    expect_failure_everywhere([&](auto &args) { args.*field = huge; }, SL_OUT_OF_RANGE,
                              std::string(name) + " is 9223372036854775807, expected at most");
  }
  expect_failure_everywhere([](auto &args) { args.batch = args.heads_q = args.n_q = (int64_t{1} << 31) - 1; },
                            SL_OUT_OF_RANGE, "batch * heads_q * tokens is 2147483647 * 2147483647 * 2147483647");
  expect_failure_everywhere([](auto &args) { args.head_dim = 257; }, SL_OUT_OF_RANGE,
                            "head_dim is 257, expected at most 256");
  expect_failure_everywhere([](auto &args) { args.head_dim_v = 1 << 20; }, SL_OUT_OF_RANGE,
                            "head_dim_v is 1048576, expected at most 256");
}

TEST(AttentionErrors, HeadsThatDoNotDivide) {
  expect_failure_everywhere([](auto &args) { args.heads_q = 4, args.heads_kv = 3; }, SL_INVALID_ARGUMENT,
                            "heads_q is 4, expected a multiple of heads_kv, which is 3");
}

TEST(AttentionErrors, DtypeScaleAndExecutor) {
  expect_failure_everywhere([](auto &args) { args.dtype = static_cast<sl_dtype>(17); }, SL_UNSUPPORTED,
                            "dtype is 17, expected float32, bfloat16, float16 or float64");
  expect_failure_everywhere([](auto &args) { args.dtype = SL_I8; }, SL_UNSUPPORTED,
                            "dtype is int8, expected float32, bfloat16, float16 or float64");
  expect_failure_everywhere([](auto &args) { args.dtype = SL_BOOL; }, SL_UNSUPPORTED,
                            "dtype is bool, expected float32");
  expect_failure_everywhere([](auto &args) { args.scale = std::nan(""); }, SL_INVALID_ARGUMENT,
                            "scale is nan, expected a finite number");
  expect_failure_everywhere([](auto &args) { args.scale = -std::numeric_limits<double>::infinity(); },
                            SL_INVALID_ARGUMENT, "scale is -inf, expected a finite number");
  static const sl_executor no_threads = {sl_serial_executor()->parallel_for, nullptr, 0};
  static const sl_executor no_function = {nullptr, nullptr, 2};
  expect_failure_everywhere([](auto &args) { args.executor = &no_threads; }, SL_INVALID_ARGUMENT,
                            "executor has threads = 0, expected at least 1");
  expect_failure_everywhere([](auto &args) { args.executor = &no_function; }, SL_INVALID_ARGUMENT, "a parallel_for");
}

TEST(AttentionErrors, MissingData) {
  auto expect = [](const Call(&calls)[2], const char *name, const Change &change) {
    for (Call call : calls) expect_failure(call, change, SL_INVALID_ARGUMENT, std::string(name) + ".data is NULL");
  };
  for (auto &calls : {std::cref(kForward), std::cref(kBackward)}) {
    expect(calls, "q", [](auto &args) { args.q.data = nullptr; });
    expect(calls, "k", [](auto &args) { args.k.data = nullptr; });
    expect(calls, "v", [](auto &args) { args.v.data = nullptr; });
    expect(calls, "a", [](auto &args) { args.a.data = nullptr; });
    expect(calls, "b", [](auto &args) { args.b.data = nullptr; });
    expect(calls, "out", [](auto &args) { args.out.data = nullptr; });
  }
  expect(kBackward, "lse", [](auto &args) { args.lse.data = nullptr; });
  expect(kBackward, "dout", [](auto &args) { args.dout.data = nullptr; });
  expect(kBackward, "dq", [](auto &args) { args.dq.data = nullptr; });
  expect(kBackward, "dk", [](auto &args) { args.dk.data = nullptr; });
  expect(kBackward, "dv", [](auto &args) { args.dv.data = nullptr; });
  expect(kBackward, "da", [](auto &args) { args.da.data = nullptr; });
  expect(kBackward, "db", [](auto &args) { args.db.data = nullptr; });
}

TEST(AttentionErrors, MissingArguments) {
  size_t bytes = 0;
  for (Call call : kForward) EXPECT_EQ(call(nullptr), SL_INVALID_ARGUMENT);
  for (Call call : kBackward) EXPECT_EQ(call(nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_gated_attention_workspace_size(nullptr, &bytes), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "args is NULL");
  sl_gated_attention_args args = AttentionProblem(plain_shape(), 1).args();
  EXPECT_EQ(sl_gated_attention_workspace_size(&args, nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_gated_attention_backward_workspace_size(&args, nullptr), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "bytes is NULL");
}

TEST(AttentionErrors, Places) {
  auto expect = [](const Change &change, const std::string &text) {
    for (Call call : kForward) expect_failure(call, change, SL_INVALID_ARGUMENT, text);
    for (Call call : kBackward) expect_failure(call, change, SL_INVALID_ARGUMENT, text);
  };
  const int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
  for (int64_t value : {int64_t{-1}, int64_t{1}, least, most}) {
    expect([&](auto &args) { args.q_offset = &value; },
           "q_offset[0] is " + std::to_string(value) +
               ", expected 0 <= q_offset <= n_k - n_q = 0, so that the queries lie among the keys");
  }
  for (int64_t value : {int64_t{1}, least, most}) {
    expect([&](auto &args) { args.text_begin = &value; },
           "text_begin[0] is " + std::to_string(value) + ", expected -2^31 <= text_begin <= 0, the first valid key");
  }
}

TEST(AttentionErrors, KeyRange) {
  for (auto [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{-1, 2}, {3, 2}, {0, 5}, {6, 7}}) {
    const int64_t range[] = {begin, end};
    std::string text = "key_range[0] is [" + std::to_string(begin) + ", " + std::to_string(end) +
                       "), expected 0 <= begin <= end <= n_k = 4";
    for (Call call : kForward) {
      expect_failure(call, [&](auto &args) { args.key_range = range; }, SL_INVALID_ARGUMENT, text);
    }
    for (Call call : kBackward) {
      expect_failure(call, [&](auto &args) { args.key_range = range; }, SL_INVALID_ARGUMENT, text);
    }
  }
}

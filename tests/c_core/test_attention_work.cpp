// Work shrinks with the kept pairs: the tile areas that forward and backward really multiply, counted by a table of
// micro-ops that counts what passes through it, against the pairs that the formula keeps.
#include <gtest/gtest.h>

#include <algorithm>

#include "support.h"

extern "C" {
#include "attention/backward.h"
#include "attention/forward.h"
}

using namespace sluice_test;

namespace {

// Areas in pairs, padding included, and keys that were packed; written by one thread, since all calls here are serial.
struct Count {
  int64_t scores = 0, values = 0, keys = 0, single = 0, packed = 0;
};
Count counted;
const sl_attention_kernel *real;

// A group of rows is worked on as wide as its first row, rounded up to whole steps.
int64_t area(int64_t rows, const int32_t *lengths, int64_t step) {
  int64_t sum = 0;
  for (int64_t r = 0; r < rows; r += real->row_tile) sum += real->row_tile * sl_round_up(lengths[r], step);
  return sum;
}

void count_nt(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *columns,
              int64_t depth, float *scores, int64_t score_stride) {
  counted.scores += area(rows, lengths, real->panel);
  real->multiply_nt(rows, lengths, left, left_stride, columns, depth, scores, score_stride);
}

void count_nn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *depths,
              int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  counted.values += area(rows, lengths, real->depth_step);
  real->multiply_nn(rows, lengths, left, left_stride, depths, capacity, width, out, out_stride);
}

void count_tn(int64_t rows, const int32_t *lengths, const void *left, int64_t left_stride, const void *depths,
              int64_t capacity, int64_t width, float *out, int64_t out_stride) {
  counted.keys += area(rows, lengths, real->panel);
  real->multiply_tn(rows, lengths, left, left_stride, depths, capacity, width, out, out_stride);
}

void count_columns(void *packed, const sl_token_rows *source, const int32_t *index, int64_t count) {
  counted.packed += count;
  real->pack_columns(packed, source, index, count);
}

void count_dots(const float *rows, int64_t row_stride, int64_t row_count, const sl_row_list *list, float *scores,
                int64_t score_stride) {
  counted.single += list->count;
  real->dot_rows(rows, row_stride, row_count, list, scores, score_stride);
}

class Work : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    real = sl_attention_list_kernels(GetParam());
    if (real->isa > sl_cpu_detect()) GTEST_SKIP() << "this processor has no " << sl_isa_name(real->isa);
    counting = *real;
    counting.multiply_nt = count_nt, counting.multiply_nn = count_nn, counting.multiply_tn = count_tn;
    counting.dot_rows = count_dots, counting.pack_columns = count_columns;
    shape.dtype = real->dtype, shape.head_dim = shape.head_dim_v = 2;
  }

  static bool has_backward() { return real->softmax_gradient_tile != nullptr; }

  // The threshold that keeps this share of the pairs that causality allows.
  static double find_threshold(const AttentionProblem &problem, double density) {
    const AttentionShape &shape = problem.shape();
    std::vector<float> sums;
    for (int64_t i = 0; i < shape.n_q; ++i) {
      for (int64_t j = 0; j <= (shape.causal ? i + shape.n_k - shape.n_q : shape.n_k - 1); ++j) {
        sums.push_back(static_cast<float>(problem.a.get(0, 0, i) + problem.b.get(0, 0, j)));
      }
    }
    size_t dropped = static_cast<size_t>((1 - density) * static_cast<double>(sums.size()));
    std::nth_element(sums.begin(), sums.begin() + static_cast<std::ptrdiff_t>(dropped), sums.end());
    return sums[dropped];
  }

  // The pairs of ops/sluice/gated_attention.h.
  static bool is_kept(const AttentionProblem &problem, int64_t i, int64_t j) {
    const AttentionShape &shape = problem.shape();
    int64_t position = i + (shape.q_offset.empty() ? shape.n_k - shape.n_q : shape.q_offset[0]);
    if (shape.causal && j > position) return false;
    bool near = j < shape.sinks || std::abs(position - j) < shape.window || (shape.causal && j == position);
    float sum = static_cast<float>(problem.a.get(0, 0, i)) + static_cast<float>(problem.b.get(0, 0, j));
    return near || !shape.logit_tau || !(sum < static_cast<float>(*shape.logit_tau));
  }

  static int64_t count_kept(const AttentionProblem &problem) {
    const AttentionShape &shape = problem.shape();
    int64_t kept = 0;
    for (int64_t i = 0; i < shape.n_q; ++i) {
      for (int64_t j = 0; j < shape.n_k; ++j) kept += is_kept(problem, i, j);
    }
    return kept;
  }

  // Fresh counts of the forward and of the backward.
  std::pair<Count, Count> run(AttentionProblem &problem) {
    sl_gated_attention_args args = problem.args();
    sl_attention_plan plan = sl_attention_make_plan(&args, &counting);
    std::vector<char> memory;
    auto give = [&](size_t bytes) {
      memory.resize(bytes + 64);
      args.workspace = reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
      args.workspace_size = bytes;
    };
    size_t bytes = 0;
    counted = {};
    if (sl_attention_is_few_rows(&args)) {
      EXPECT_EQ(sl_attention_few_rows_workspace(&plan, &bytes), SL_OK);
      give(bytes);
      EXPECT_EQ(sl_attention_run_few_rows(&plan), SL_OK) << sl_last_error();
    } else {
      EXPECT_EQ(sl_attention_tiled_workspace(&plan, &bytes), SL_OK);
      give(bytes);
      EXPECT_EQ(sl_attention_run_tiled(&plan), SL_OK) << sl_last_error();
    }
    Count forward = counted;
    if (!has_backward()) return {forward, {}};
    plan = sl_attention_make_backward_plan(&args, &counting);
    EXPECT_EQ(sl_attention_backward_workspace(&plan, &bytes), SL_OK);
    give(bytes);
    counted = {};
    EXPECT_EQ(sl_attention_run_backward(&plan), SL_OK) << sl_last_error();
    return {forward, counted};
  }

  AttentionProblem make_problem(double density) {
    shape.logit_tau = 0;
    double threshold = find_threshold(AttentionProblem(shape, 3, 1), density);
    shape.logit_tau.reset();
    if (density < 1) shape.logit_tau = threshold;
    return AttentionProblem(shape, 3, 1);
  }

  sl_attention_kernel counting{};
  AttentionShape shape;
};

}  // namespace

// What is not kept but computed all the same grows with n alone: rows are rounded up to panels where a prefix ends and
// to groups where neighbours differ, and the window has a triangle at either end.
TEST_P(Work, ComputedPairsAreTheKeptOnesAndABorder) {
  for (bool causal : {true, false}) {
    for (auto [window, sinks] : {std::pair{0, 0}, std::pair{32, 4}}) {
      for (double density : {1., .5, .1, .02}) {
        shape.n_q = shape.n_k = 1024, shape.causal = causal, shape.window = window, shape.sinks = sinks;
        AttentionProblem problem = make_problem(density);
        int64_t kept = count_kept(problem), border = 30 + 5 * real->panel + (causal ? 2 : 5) * window;
        double most = 1.02 * static_cast<double>(kept) + static_cast<double>(border * shape.n_q);
        auto [forward, backward] = run(problem);
        SCOPED_TRACE(shape.text() + " density=" + std::to_string(density) + " kept=" + std::to_string(kept));
        EXPECT_GE(forward.scores, kept - shape.n_q);  // a query's own key may be seen to apart
        EXPECT_LE(static_cast<double>(forward.scores), most);
        EXPECT_LE(forward.values, forward.scores);
        if (!has_backward()) continue;
        EXPECT_GE(backward.scores, 2 * (kept - shape.n_q));  // <q, k> and <dout, v>
        EXPECT_LE(static_cast<double>(backward.scores), 2 * most);
        EXPECT_LE(backward.keys, backward.scores);  // for dv and dk
        EXPECT_LE(2 * backward.values, backward.scores);
      }
    }
  }
}

TEST_P(Work, AThirtiethOfThePairsIsLessThanASixthOfTheWork) {
  shape.n_q = shape.n_k = 2048, shape.causal = true;
  AttentionProblem dense = make_problem(1), sparse = make_problem(1. / 30);
  auto [dense_forward, dense_backward] = run(dense);
  auto [forward, backward] = run(sparse);
  EXPECT_LT(6 * forward.scores, dense_forward.scores);
  EXPECT_LT(6 * forward.values, dense_forward.values);
  if (has_backward()) {
    EXPECT_LT(6 * backward.scores, dense_backward.scores);
    EXPECT_LT(6 * backward.keys, dense_backward.keys);
  }
}

TEST_P(Work, ALongCacheCostsWhatItsTextDoes) {
  for (double density : {1., .3}) {
    shape.n_q = 256, shape.n_k = 4096, shape.causal = true, shape.q_offset = {64};
    AttentionProblem problem = make_problem(density);
    int64_t kept = count_kept(problem), border = 30 + 5 * real->panel;
    double most = 1.02 * static_cast<double>(kept) + static_cast<double>(border * shape.n_q);
    auto [forward, backward] = run(problem);
    EXPECT_LE(static_cast<double>(forward.scores), most);
    EXPECT_LE(forward.packed, 4 * (64 + 256));
    if (!has_backward()) continue;
    EXPECT_LE(static_cast<double>(backward.scores), 2 * most);
    EXPECT_LE(backward.packed, 8 * (64 + 256));  // of k and of v
  }
}

TEST_P(Work, DecodingReadsKeptKeysOnlyAndOnce) {
  shape.n_q = 3, shape.n_k = 2000, shape.causal = true, shape.window = 8, shape.sinks = 2;
  AttentionProblem problem = make_problem(0.1);
  auto [forward, backward] = run(problem);
  int64_t keys = 0;
  for (int64_t j = 0; j < shape.n_k; ++j) {
    keys += is_kept(problem, 0, j) || is_kept(problem, 1, j) || is_kept(problem, 2, j);
  }
  EXPECT_EQ(forward.single, keys);
  EXPECT_LT(forward.single, count_kept(problem));
  EXPECT_EQ(forward.scores, 0);
}

// What a profile counts is what this table counts, and it changes no bit.
TEST(Profile, CountsWhatTheProductsGoOver) {
  for (double logit_tau : {-100.0, 1.0}) {
    AttentionShape shape;
    shape.n_q = shape.n_k = 500, shape.causal = true, shape.logit_tau = logit_tau;
    AttentionProblem problem(shape, 3);
    ASSERT_EQ(problem.run_forward(), SL_OK) << sl_last_error();
    std::vector<double> out = problem.out.values();
    int64_t kept = 0;
    for (double each : problem.kept.values()) kept += static_cast<int64_t>(each);
    sl_attention_profile profile, nothing;
    sl_attention_profile_begin();
    ASSERT_EQ(problem.run_forward(), SL_OK) << sl_last_error();
    sl_attention_profile_end(&profile);
    EXPECT_EQ(problem.out.values(), out);
    EXPECT_GE(profile.score_pairs, kept - shape.batch * shape.heads_q * shape.n_q);  // own keys are taken apart
    EXPECT_GE(profile.score_pairs, profile.value_pairs);
    double parts = 0;
    for (double part : {profile.sort, profile.pack, profile.rows, profile.scores, profile.softmax, profile.values}) {
      EXPECT_GT(part, 0);
      parts += part;
    }
    EXPECT_LE(parts, profile.busy);
    ASSERT_EQ(problem.run_forward(), SL_OK);  // while nobody asks
    sl_attention_profile_begin();
    sl_attention_profile_end(&nothing);
    EXPECT_EQ(nothing.score_pairs, 0);
    EXPECT_EQ(nothing.busy, 0);
  }
}

// Which pairs are computed depends on a table's tile, not on its dtype: one table of each tile.
INSTANTIATE_TEST_SUITE_P(Attention, Work, testing::ValuesIn([] {
                           std::vector<int> numbers;
                           for (int i = 0; sl_attention_list_kernels(i); ++i) {
                             const sl_attention_kernel *table = sl_attention_list_kernels(i);
                             if (table->dtype == SL_F32 || table->depth_step > 1) numbers.push_back(i);
                           }
                           return numbers;
                         }()),
                         [](const auto &table) { return std::string(sl_attention_list_kernels(table.param)->name); });

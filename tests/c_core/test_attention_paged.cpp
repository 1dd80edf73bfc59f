// Paged caches: blocks in any order give the bits that the same keys give in a dense tensor, on every tier; holes are
// keys that are not there; dropping keys that no query reaches changes no bit; wrong tables are refused by name.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "support.h"

using namespace sluice_test;

namespace {

const double kInfinity = std::numeric_limits<double>::infinity();
const double kNan = std::numeric_limits<double>::quiet_NaN();

// A problem whose keys lie in blocks as well; the blocks that no key is in are full of NaN.
class PagedProblem {
 public:
  PagedProblem(const AttentionShape &shape, uint64_t seed, int64_t block_size, Layout layout = Layout::kDense)
      : dense(shape, seed), block_size_(block_size), random_(seed + 1) {
    columns_ = (shape.n_k + block_size - 1) / block_size;
    blocks_ = shape.batch * columns_ + 2;
    std::vector<int32_t> order(static_cast<size_t>(blocks_));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i-- > 1;) {
      std::swap(order[i], order[static_cast<size_t>(random_.integer(0, static_cast<int64_t>(i)))]);
    }
    table.assign(order.begin(), order.begin() + shape.batch * columns_);
    k = page(dense.k, layout), v = page(dense.v, layout), b = page(dense.b, layout);
  }
  sl_gated_attention_args args(const sl_executor *executor = nullptr) const {
    sl_gated_attention_args args = dense.args(executor);
    args.k = k.view4(), args.v = v.view4(), args.b = b.view3();
    args.block_table = table.data(), args.max_blocks = columns_, args.block_size = block_size_, args.blocks = blocks_;
    args.dattn_mask.data = nullptr;
    return args;
  }
  std::pair<std::vector<double>, std::vector<double>> run(const sl_executor *executor = nullptr) {
    dense.clear_results();
    sl_gated_attention_args args = this->args(executor);
    size_t bytes = 0;
    EXPECT_EQ(sl_gated_attention_workspace_size(&args, &bytes), SL_OK) << sl_last_error();
    GuardedBuffer workspace(bytes);
    if (bytes) std::memset(workspace.data(), 0xff, bytes);
    args.workspace = workspace.data(), args.workspace_size = bytes;
    EXPECT_EQ(sl_gated_attention(&args), SL_OK) << sl_last_error();
    EXPECT_TRUE(workspace.intact());
    EXPECT_EQ(dense.damage(), "");
    return {dense.out.values(), dense.lse.values()};
  }
  std::pair<std::vector<double>, std::vector<double>> run_reference() {
    dense.clear_results();
    sl_gated_attention_args args = this->args();
    EXPECT_EQ(sl_gated_attention_reference(&args), SL_OK) << sl_last_error();
    return {dense.out.values(), dense.lse.values()};
  }
  bool is_hole(int64_t batch, int64_t key) const {
    return table[static_cast<size_t>(batch * columns_ + key / block_size_)] < 0;
  }
  // Makes holes of the columns that are chosen; what their blocks hold becomes NaN.
  void drop(const std::function<bool(int64_t batch, int64_t column)> &is_chosen) {
    for (int64_t batch = 0; batch < dense.shape().batch; ++batch) {
      for (int64_t column = 0; column < columns_; ++column) {
        int32_t &block = table[static_cast<size_t>(batch * columns_ + column)];
        if (!is_chosen(batch, column)) continue;
        for (Tensor *cache : {&k, &v, &b}) {
          cache->for_each([&](int64_t i, int64_t head, int64_t t, int64_t c) {
            if (i == block) cache->set(i, head, t, c, kNan);
          });
        }
        block = -1;
      }
    }
  }

  AttentionProblem dense;
  Tensor k, v, b;
  std::vector<int32_t> table;

 private:
  Tensor page(const Tensor &source, Layout layout) {
    auto [batch, heads, tokens, channels] = source.shape();
    Tensor cache(source.dtype(), {blocks_, heads, block_size_, channels}, layout);
    cache.fill([] { return kNan; });
    source.for_each([&](int64_t i, int64_t head, int64_t t, int64_t c) {
      int32_t block = table[static_cast<size_t>(i * columns_ + t / block_size_)];
      cache.set(block, head, t % block_size_, c, source.get(i, head, t, c));
    });
    return cache;
  }

  int64_t block_size_, columns_ = 0, blocks_ = 0;
  Random random_;
};

std::pair<std::vector<double>, std::vector<double>> run_dense(AttentionProblem &problem) {
  problem.clear_results();
  EXPECT_EQ(problem.run_forward(), SL_OK) << sl_last_error();
  return {problem.out.values(), problem.lse.values()};
}

// NaN is the same as NaN.
template <typename Result>
void expect_same_bits(const Result &found, const Result &wanted) {
  for (auto [got, want] : {std::pair{&found.first, &wanted.first}, {&found.second, &wanted.second}}) {
    ASSERT_EQ(got->size(), want->size());
    size_t different = 0;
    for (size_t i = 0; i < got->size(); ++i) {
      different += (*got)[i] != (*want)[i] && !(std::isnan((*got)[i]) && std::isnan((*want)[i]));
    }
    EXPECT_EQ(different, 0u);
  }
}

template <typename Result>
void expect_close(const Result &found, const Result &wanted, sl_dtype dtype) {
  double limit = dtype == SL_F32 ? 4e-6 : dtype == SL_F16 ? 4e-4 : 4e-3;
  Distance out = measure_distance(found.first, wanted.first), lse = measure_distance(found.second, wanted.second);
  EXPECT_TRUE(out.same_specials && lse.same_specials);
  EXPECT_LE(out.relative_rms, limit);
  EXPECT_LE(out.relative_maximum, 8 * limit);
  EXPECT_LE(lse.relative_maximum, 4e-6);
}

AttentionShape random_shape(Random &random) {
  AttentionShape shape;
  shape.dtype = random.pick<sl_dtype>({SL_F32, SL_F32, SL_BF16, SL_F16});
  shape.batch = random.integer(1, 3);
  shape.heads_kv = random.integer(1, 2);
  shape.heads_q = shape.heads_kv * random.integer(1, 3);
  shape.n_k = random.integer(1, random.pick<int64_t>({20, 130, 500}));
  shape.n_q = random.pick<int64_t>({1, 2, 4, 7, random.integer(5, 300)});
  shape.head_dim = random.integer(1, 40);
  shape.head_dim_v = random.integer(1, 40);
  shape.causal = random.chance(0.7);
  shape.window = random.chance(0.5) ? 0 : random.integer(1, random.pick<int64_t>({8, 100, 600}));
  shape.sinks = random.chance(0.6) ? 0 : random.integer(1, random.pick<int64_t>({4, 300}));
  if (random.chance(0.8)) shape.logit_tau = random.pick<double>({-2, 0, 1, 3, 100, -kInfinity});
  if (random.chance(0.4)) {
    for (int64_t batch = 0; batch < shape.batch; ++batch) {
      int64_t begin = random.integer(0, shape.n_k);
      shape.key_range.insert(shape.key_range.end(), {begin, random.integer(begin, shape.n_k)});
    }
  }
  shape.place_at_random(random);
  shape.bend_at_random(random);
  return shape;
}

int64_t random_block_size(Random &random) { return random.pick<int64_t>({1, 16, 100, random.integer(2, 40)}); }
Layout random_layout(Random &random) {
  return random.pick<Layout>({Layout::kDense, Layout::kTokenMajor, Layout::kPadded});
}

}  // namespace

// What paging is: the formula with holes is the formula with their keys masked.
TEST(ReferencePaged, HolesAreMaskedKeys) {
  Random random(3);
  for (int round = 0; round < 60; ++round) {
    AttentionShape shape = random_shape(random);
    shape.dtype = SL_F64;
    shape.n_k = std::min<int64_t>(shape.n_k, 60), shape.n_q = std::min<int64_t>(shape.n_q, 12);
    shape.key_range.clear(), shape.q_offset.clear(), shape.text_begin.clear();
    shape.mask = SL_BOOL, shape.mask_is_broadcast = {false, false, false, false};
    PagedProblem paged(shape, static_cast<uint64_t>(round), random_block_size(random), random_layout(random));
    paged.drop([&](int64_t, int64_t) { return random.chance(0.3); });
    auto found = paged.run_reference();
    AttentionProblem &dense = paged.dense;
    dense.mask.for_each([&](int64_t i, int64_t head, int64_t query, int64_t key) {
      if (paged.is_hole(i, key)) dense.mask.set(i, head, query, key, 0);
    });
    SCOPED_TRACE(shape.text());
    dense.clear_results();
    sl_gated_attention_args args = dense.args();
    ASSERT_EQ(sl_gated_attention_reference(&args), SL_OK) << sl_last_error();
    expect_same_bits(found, {dense.out.values(), dense.lse.values()});
  }
}

// Queries before the text see nothing; columns that no valid key needs are not looked at.
TEST(ReferencePaged, SequencesOfAnyLengthLieInOneTable) {
  AttentionShape shape;
  shape.dtype = SL_F64, shape.batch = 3, shape.n_q = 4, shape.n_k = 11, shape.causal = true;
  shape.key_range = {0, 11, 0, 2, 0, 0}, shape.q_offset = {7, -2, -4};
  PagedProblem paged(shape, 1, 4);
  paged.table[5] = 1 << 30, paged.table[8] = -7;
  auto [out, lse] = paged.run_reference();
  for (int64_t row = 0; row < 12; ++row) {
    bool empty = row == 4 || row == 5 || row >= 8;
    EXPECT_EQ(lse[static_cast<size_t>(row)] == -kInfinity, empty) << row;
    EXPECT_EQ(out[static_cast<size_t>(8 * row)] == 0, empty) << row;
  }
  double gate = 1 / (1 + std::exp(-paged.dense.a.get(1, 0, 2) - paged.dense.b.get(1, 0, 0)));
  EXPECT_DOUBLE_EQ(out[size_t{8 * 6}], gate * paged.dense.v.get(1, 0, 0, 0));
}

class Paged : public testing::TestWithParam<sl_isa> {
 protected:
  void SetUp() override {
    if (GetParam() > sl_cpu_detect()) GTEST_SKIP() << "this processor has no " << sl_isa_name(GetParam());
    cap.emplace(GetParam());
  }
  std::optional<IsaCap> cap;
};

TEST_P(Paged, BlocksInAnyOrderGiveTheBitsOfADenseTensor) {
  Random random(7);
  for (int round = 0; round < (kUnderThreadSanitizer ? 15 : 40); ++round) {
    AttentionShape shape = random_shape(random);
    int64_t block_size = random_block_size(random);
    PagedProblem paged(shape, static_cast<uint64_t>(round), block_size, random_layout(random));
    SCOPED_TRACE(shape.text() + " blocks of " + std::to_string(block_size));
    auto wanted = run_dense(paged.dense);
    expect_same_bits(paged.run(), wanted);
    if (HasFailure()) return;
  }
}

TEST_P(Paged, HolesAnywhereAreLeftOut) {
  Random random(9);
  for (int round = 0; round < (kUnderThreadSanitizer ? 15 : 50); ++round) {
    AttentionShape shape = random_shape(random);
    int64_t block_size = random_block_size(random);
    PagedProblem paged(shape, static_cast<uint64_t>(round), block_size, random_layout(random));
    double share = random.pick<double>({0.1, 0.5, 0.9});
    paged.drop([&](int64_t, int64_t) { return random.chance(share); });
    SCOPED_TRACE(shape.text() + " blocks of " + std::to_string(block_size));
    expect_close(paged.run(), paged.run_reference(), shape.dtype);
    if (HasFailure()) return;
  }
}

TEST_P(Paged, SeveralChunksWithHoles) {
  struct Case {
    int64_t n_q, n_k, window, sinks;
    bool causal;
    double tau;
  } cases[] = {{900, 900, 0, 0, true, 1.5}, {700, 1400, 130, 5, true, 2},
               {500, 900, 70, 3, false, 2}, {600, 1100, 90, 0, true, -kInfinity},
               {3, 1700, 40, 4, true, 1},   {400, 1000, 0, 0, false, -kInfinity}};
  for (const Case &row : cases) {
    AttentionShape shape;
    shape.n_q = row.n_q, shape.n_k = row.n_k, shape.window = row.window, shape.sinks = row.sinks;
    shape.causal = row.causal, shape.logit_tau = row.tau;
    SCOPED_TRACE(shape.text());
    PagedProblem paged(shape, 4, 16);
    Random random(4);
    paged.drop([&](int64_t, int64_t column) { return random.chance(0.2) || (column > 20 && column < 60); });
    auto wanted = paged.run_reference();
    auto found = paged.run();
    expect_close(found, wanted, shape.dtype);
    ThreadExecutor threads(3);
    expect_same_bits(paged.run(threads.get()), found);
  }
}

// Keys that no query reaches: far, no sink, and b below the threshold whatever a is.
TEST_P(Paged, DroppingKeysThatNoQueryReachesChangesNoBit) {
  Random random(5);
  int64_t dropped = 0;
  for (int round = 0; round < (kUnderThreadSanitizer ? 10 : 20); ++round) {
    AttentionShape shape = random_shape(random);
    shape.causal = true, shape.n_k = random.integer(100, 700), shape.n_q = random.pick<int64_t>({1, 3, 40});
    shape.logit_tau = random.pick<double>({1, 2, 3}), shape.batch = 1;
    shape.key_range.clear(), shape.q_offset.clear(), shape.text_begin.clear();
    int64_t block_size = random.pick<int64_t>({1, 4, 16});
    PagedProblem paged(shape, static_cast<uint64_t>(round), block_size);
    double a_max = -kInfinity;
    for (double a : paged.dense.a.values()) a_max = std::max(a_max, a);
    // Blocks as texts have them: most of no interest, in stretches.
    auto lower = [&](int64_t key) { return key / block_size % 3 ? 12.0 : 0.0; };
    paged.b.fill([&] { return random.normal(2); });
    for (int64_t key = 0; key < shape.n_k; ++key) {
      int32_t block = paged.table[static_cast<size_t>(key / block_size)];
      for (int64_t head = 0; head < shape.heads_kv; ++head) {
        double b = paged.b.get(block, head, key % block_size, 0) - lower(key);
        paged.b.set(block, head, key % block_size, 0, b);
      }
    }
    SCOPED_TRACE(shape.text() + " blocks of " + std::to_string(block_size));
    auto wanted = paged.run();
    int64_t first = shape.n_k - shape.n_q, near = std::max<int64_t>(shape.window, 1);
    paged.drop([&](int64_t, int64_t column) {
      bool dead = true;
      for (int64_t key = column * block_size; key < (column + 1) * block_size; ++key) {
        dead = dead && key >= shape.sinks && key <= first - near;
        for (int64_t head = 0; head < shape.heads_kv && dead; ++head) {
          float b =
              static_cast<float>(paged.b.get(paged.table[static_cast<size_t>(column)], head, key % block_size, 0));
          dead = static_cast<float>(a_max) + b < static_cast<float>(*shape.logit_tau);
        }
      }
      dropped += dead;
      return dead;
    });
    expect_same_bits(paged.run(), wanted);
    if (HasFailure()) return;
  }
  EXPECT_GT(dropped, 100);
}

// Rows that come out non-finite are computed anew, pair by pair.
TEST_P(Paged, NotANumberInADroppedKeyStaysThere) {
  for (int64_t n_q : {1, 40}) {
    AttentionShape shape;
    shape.heads_q = 2, shape.n_q = n_q, shape.n_k = 100, shape.causal = true, shape.logit_tau = 0.5;
    PagedProblem paged(shape, 2, 16);
    paged.drop([](int64_t, int64_t column) { return column == 1; });
    int32_t block = paged.table[3];
    paged.v.set(block, 0, 2, 0, kNan), paged.k.set(block, 0, 2, 0, kInfinity);
    paged.b.set(block, 0, 2, 0, -30);
    auto found = paged.run();
    expect_close(found, paged.run_reference(), shape.dtype);
    EXPECT_TRUE(std::all_of(found.first.begin(), found.first.end(), [](double x) { return std::isfinite(x); }));
  }
}

INSTANTIATE_TEST_SUITE_P(Attention, Paged,
                         testing::Values(SL_ISA_SCALAR, SL_ISA_AVX2, SL_ISA_AVX512, SL_ISA_AVX512BF16),
                         [](const auto &tier) { return std::string(sl_isa_name(tier.param)); });

TEST(PagedErrors, AreNamed) {
  AttentionShape shape;
  shape.batch = 2, shape.n_q = 2, shape.n_k = 9, shape.key_range = {0, 9, 0, 5}, shape.q_offset = {7, 3};
  using Change = std::function<void(PagedProblem &, sl_gated_attention_args &)>;
  struct Case {
    Change change;
    sl_status status;
    const char *text;
  } cases[] = {
      {[](auto &p, auto &) { p.table[4] = 8; }, SL_INVALID_ARGUMENT, "block_table[1][1] is 8, expected 0 <= block < 8"},
      {[](auto &p, auto &) { p.table[0] = -2; }, SL_INVALID_ARGUMENT, "block_table[0][0] is -2, expected 0 <= block"},
      {[](auto &, auto &args) { args.max_blocks = 2; }, SL_INVALID_ARGUMENT,
       "batch entry 0 has keys up to 9, expected at most max_blocks * block_size = 2 * 4"},
      {[](auto &, auto &args) { args.block_size = 0; }, SL_INVALID_ARGUMENT, "block_size is 0, expected at least 1"},
      {[](auto &, auto &args) { args.blocks = -1; }, SL_INVALID_ARGUMENT, "blocks is -1, expected at least 0"},
      {[](auto &, auto &args) { args.blocks = int64_t{1} << 31, args.block_size = 1 << 20; }, SL_OUT_OF_RANGE,
       "blocks * block_size * heads_kv is 2147483648 * 1048576 * 1"},
      {[](auto &, auto &args) { ++args.k.batch_stride; }, SL_INVALID_ARGUMENT,
       "the strides from block to block are 33"},
      {[](auto &, auto &args) { args.v.batch_stride *= 2; }, SL_INVALID_ARGUMENT, "are 32 in k and 64 in v"},
      {[](auto &, auto &args) { args.k.batch_stride = args.v.batch_stride = int64_t{8} << 40; }, SL_OUT_OF_RANGE,
       "expected at most 2^31 rows"},
      {[](auto &, auto &args) { args.k.data = nullptr; }, SL_INVALID_ARGUMENT, "k.data is NULL, expected 32 elements"},
      {[](auto &p, auto &args) {
         static int64_t offsets[2];
         offsets[0] = 7, offsets[1] = -3, args.q_offset = offsets, (void)p;
       },
       SL_INVALID_ARGUMENT, "q_offset[1] is -3, expected -n_q = -2 <= q_offset <= n_k - n_q = 7"}};
  for (const Case &row : cases) {
    for (auto call : {sl_gated_attention, sl_gated_attention_reference}) {
      PagedProblem paged(shape, 1, 4);
      sl_gated_attention_args args = paged.args();
      row.change(paged, args);
      EXPECT_EQ(call(&args), row.status) << row.text;
      EXPECT_NE(std::string(sl_last_error()).find(row.text), std::string::npos) << sl_last_error();
    }
  }
  for (auto call : {sl_gated_attention_backward, sl_gated_attention_backward_reference}) {
    PagedProblem paged(shape, 1, 4);
    sl_gated_attention_args args = paged.args();
    EXPECT_EQ(call(&args), SL_UNSUPPORTED);
    EXPECT_NE(std::string(sl_last_error()).find("a paged cache has no gradient"), std::string::npos) << sl_last_error();
  }
}

// Lengths become places; without an offset the last query sits at the last key.
TEST(PagedPlaces, ComeFromLengths) {
  const int32_t table[] = {0, 1, 2, 3, 4, 5}, lengths[] = {9, 2, 0};
  const int64_t offsets[] = {1, -2, 12};
  for (bool given : {false, true}) {
    sl_gated_attention_args args{};
    args.batch = 3, args.heads_q = args.heads_kv = 1, args.n_q = 2, args.head_dim = args.head_dim_v = 8;
    args.max_blocks = 2, args.block_size = 6, args.blocks = 6, args.q_offset = given ? offsets : nullptr;
    int64_t places[9];
    ASSERT_EQ(sl_gated_attention_place_pages(&args, table, lengths, SL_I32, places), SL_OK) << sl_last_error();
    EXPECT_EQ(args.n_k, given ? 14 : 9);
    EXPECT_EQ(std::vector<int64_t>(args.key_range, args.key_range + 6), (std::vector<int64_t>{0, 9, 0, 2, 0, 0}));
    EXPECT_EQ(std::vector<int64_t>(args.q_offset, args.q_offset + 3),
              given ? (std::vector<int64_t>{1, -2, 12}) : (std::vector<int64_t>{7, 0, -2}));
  }
}

TEST(PagedPlaces, WrongOnesAreNamed) {
  struct Case {
    int64_t length, offset;
    sl_dtype dtype;
    const char *text;
  } cases[] = {{13, 0, SL_I64, "seqlens_k[0] is 13, expected 0 to max_blocks * block_size = 2 * 6"},
               {-1, 0, SL_I64, "seqlens_k[0] is -1, expected 0 to"},
               {3, -3, SL_I64, "q_offset[0] is -3, expected -n_q = -2 to max_blocks * block_size = 12"},
               {3, 13, SL_I64, "q_offset[0] is 13, expected -n_q = -2 to"},
               {3, 0, SL_F32, "seqlens_k is float32, expected int32 or int64"}};
  for (const Case &row : cases) {
    sl_gated_attention_args args{};
    args.batch = args.heads_q = args.heads_kv = 1, args.n_q = 2, args.head_dim = args.head_dim_v = 8;
    args.max_blocks = 2, args.block_size = 6, args.blocks = 2, args.q_offset = &row.offset;
    int64_t places[3];
    EXPECT_NE(sl_gated_attention_place_pages(&args, nullptr, &row.length, row.dtype, places), SL_OK) << row.text;
    EXPECT_NE(std::string(sl_last_error()).find(row.text), std::string::npos) << sl_last_error();
  }
}

// Cuts of layers and shares of micro-batches against all there are; what they say where nothing fits; bad input.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include <sluice/balance.h>

#include "schedule_problem.h"

namespace sluice_test {
namespace {

struct Cut {
  sl_cut_args args{};
  sl_cut_result result{};
  std::vector<double> layer, factors, extra, bytes, kept_bytes, kept, extra_bytes, limits;
  std::vector<int64_t> first;

  sl_status run() {
    auto data = [](std::vector<double> &values) { return values.empty() ? nullptr : values.data(); };
    args.size = sizeof args, args.layers = static_cast<int64_t>(layer.size());
    args.layer_s = data(layer), args.factors = data(factors), args.extra_s = data(extra);
    args.layer_bytes = data(bytes), args.kept_bytes = data(kept_bytes), args.kept = data(kept);
    args.extra_bytes = data(extra_bytes), args.limits = data(limits);
    size_t size = 0;
    EXPECT_EQ(sl_cut_layers_workspace_size(&args, &size), SL_OK) << sl_last_error();
    GuardedBuffer workspace(size);
    args.workspace = workspace.data(), args.workspace_size = size;
    first.assign(static_cast<size_t>(args.stages) + 1, -1), args.first = first.data();
    result.size = sizeof result;
    sl_status status = sl_cut_layers(&args, &result);
    EXPECT_TRUE(workspace.intact());
    return status;
  }
  double at(const std::vector<double> &values, size_t index, double otherwise) const {
    return values.empty() ? otherwise : values[index];
  }
  // The value of a cut, infinite where it doesn't fit.
  double value(const std::vector<int64_t> &begins) const {
    double longest = 0, sum = 0;
    for (size_t s = 0; s + 1 < begins.size(); ++s) {
      double time = 0, memory = at(extra_bytes, s, 0);
      if (begins[s + 1] - begins[s] < args.least_layers) return INFINITY;
      for (auto l = static_cast<size_t>(begins[s]); l < static_cast<size_t>(begins[s + 1]); ++l) {
        time += layer[l];
        memory += at(bytes, l, 0) + at(kept, s, 1) * at(kept_bytes, l, 0);
      }
      if (memory > at(limits, s, INFINITY)) return INFINITY;
      time = at(factors, s, 1) * time + at(extra, s, 0);
      longest = std::max(longest, time), sum += time;
    }
    return args.bottleneck_weight == INFINITY ? longest + 1e-6 * sum : args.bottleneck_weight * longest + sum;
  }
  double best_of_all() const {
    double best = INFINITY;
    std::vector<int64_t> begins(static_cast<size_t>(args.stages) + 1, 0);
    begins.back() = static_cast<int64_t>(layer.size());
    auto place = [&](auto &&self, size_t stage) -> void {
      if (stage + 1 == begins.size()) {
        best = std::min(best, value(begins));
        return;
      }
      for (begins[stage] = begins[stage - 1]; begins[stage] <= begins.back(); ++begins[stage]) self(self, stage + 1);
    };
    place(place, 1);
    return best;
  }
};

Cut random_cut(Random &random) {
  Cut cut;
  auto layers = static_cast<size_t>(random.integer(1, 9));
  cut.args.stages = random.integer(1, 5);
  auto stages = static_cast<size_t>(cut.args.stages);
  bool whole = random.chance(0.5);  // whole numbers lead to ties
  auto fill = [&](std::vector<double> &values, size_t count, double low, double high) {
    values.resize(count);
    for (double &value : values) {
      value = random.uniform(low, high);
      if (whole) value = std::ceil(value);
    }
  };
  fill(cut.layer, layers, 0, 6);
  if (random.chance(0.6)) fill(cut.factors, stages, 0.5, 3);
  if (random.chance(0.4)) fill(cut.extra, stages, 0, 4);
  if (random.chance(0.6)) {
    fill(cut.bytes, layers, 0, 5), fill(cut.limits, stages, 5, 30);
    if (random.chance(0.5)) fill(cut.kept_bytes, layers, 0, 2);
    if (random.chance(0.5)) fill(cut.kept, stages, 0, 4);
    if (random.chance(0.3)) fill(cut.extra_bytes, stages, 0, 4);
  }
  cut.args.least_layers = random.integer(0, static_cast<int64_t>(layers / stages));
  cut.args.bottleneck_weight = random.pick<double>({0, 0.5, 1, 3, 15, INFINITY});
  return cut;
}

TEST(CutLayers, IsTheBestOfAllCuts) {
  Random random(7);
  int fitting = 0, refused = 0;
  for (int round = 0; round < 4000; ++round) {
    Cut cut = random_cut(random);
    double best = cut.best_of_all();
    sl_status status = cut.run();
    if (std::isinf(best)) {
      ASSERT_EQ(status, SL_OUT_OF_RANGE);
      ++refused;
      continue;
    }
    ASSERT_EQ(status, SL_OK) << sl_last_error();
    ASSERT_EQ(cut.first.front(), 0);
    ASSERT_EQ(cut.first.back(), cut.args.layers);
    ASSERT_NEAR(cut.value(cut.first), best, 1e-9 * (1 + best)) << "round " << round;
    if (cut.args.bottleneck_weight < INFINITY) {
      ASSERT_NEAR(cut.args.bottleneck_weight * cut.result.max_s + cut.result.sum_s, best, 1e-9 * (1 + best));
    }
    ++fitting;
  }
  EXPECT_GT(fitting, 2000);
  EXPECT_GT(refused, 100);
}

TEST(CutLayers, GivesASlowRankLess) {
  Cut cut;
  cut.layer.assign(24, 1), cut.args.stages = 4, cut.args.bottleneck_weight = INFINITY;
  ASSERT_EQ(cut.run(), SL_OK);
  EXPECT_EQ(cut.first, (std::vector<int64_t>{0, 6, 12, 18, 24}));
  cut.factors = {1, 2, 1, 1};
  ASSERT_EQ(cut.run(), SL_OK);
  EXPECT_EQ(cut.result.max_s, 7);
  EXPECT_EQ(cut.first[2] - cut.first[1], 3);
}

TEST(CutLayers, NeedsFewRoundsWhereMuchIsAlike) {
  Cut cut;
  cut.layer.assign(96, 1), cut.args.stages = 16, cut.args.bottleneck_weight = 1;
  ASSERT_EQ(cut.run(), SL_OK);
  EXPECT_EQ(cut.result.rounds, 3);
  for (int i = 0; i < 16; ++i) cut.factors.push_back(i % 3 == 0 ? 2 : i % 3 == 1 ? 1 : 1.5);
  ASSERT_EQ(cut.run(), SL_OK);
  EXPECT_LT(cut.result.rounds, 12);
}

// The value that is made small is the time of a step, as the simulation has it.
TEST(CutLayers, MinimisesTheTimeOfAStep) {
  Random random(11);
  for (int round = 0; round < 300; ++round) {
    int64_t p = random.integer(1, 5), m = random.integer(1, 12);
    Problem problem({SL_SCHEDULE_GPIPE, p, 1, m}, 1, 1, 1);
    double longest = 0, sum = 0;
    for (size_t s = 0; s < problem.stages(); ++s) {
      double time = random.uniform(0, 3);
      problem.forward[s] = problem.input[s] = problem.weight[s] = time / 3;
      longest = std::max(longest, time), sum += time;
    }
    double expected = static_cast<double>(m - 1) * longest + sum;
    EXPECT_NEAR(simulate(problem).result.makespan_s, expected, 1e-9);
    problem.args.schedule.kind = SL_SCHEDULE_1F1B;
    EXPECT_LE(simulate(problem).result.makespan_s, expected + 1e-9);
  }
}

TEST(CutLayers, SaysWhatWouldFit) {
  Cut cut;
  cut.layer.assign(10, 1), cut.bytes.assign(10, 4), cut.args.stages = 2, cut.args.least_layers = 1;
  cut.limits = {13, 21};
  EXPECT_EQ(cut.run(), SL_OUT_OF_RANGE);
  EXPECT_STREQ(sl_last_error(), "limits leave room for the first 8 of 10 layers, expected room for all");
  cut.limits = {3, 100};
  EXPECT_EQ(cut.run(), SL_OUT_OF_RANGE);
  EXPECT_STREQ(sl_last_error(), "limits are too small for 1 layers on each of 2 stages, expected room for them");
  cut.limits = {INFINITY, 4};
  EXPECT_EQ(cut.run(), SL_OK);
  EXPECT_EQ(cut.first, (std::vector<int64_t>{0, 9, 10}));
}

TEST(CutLayers, RefusesBadInputWithItsValue) {
  auto message = [](auto change) -> std::string {
    Cut cut;
    cut.layer.assign(6, 1), cut.args.stages = 3, cut.args.least_layers = 1;
    change(cut);
    EXPECT_NE(cut.run(), SL_OK);
    return sl_last_error();
  };
  EXPECT_EQ(message([](Cut &c) { c.layer[2] = -1; }), "layer_s[2] is -1, expected 0 to 1e+09");
  EXPECT_EQ(message([](Cut &c) { c.factors = {1, 0, 1}; }), "factors[1] is 0, expected 1e-06 to 1e+06");
  EXPECT_EQ(message([](Cut &c) { c.limits = {1, 1, NAN}; }), "limits[2] is nan, expected 0 to inf");
  EXPECT_EQ(message([](Cut &c) { c.kept = {-1, 1, 1}; }), "kept[0] is -1, expected 0 to 1e+09");
  EXPECT_EQ(message([](Cut &c) { c.args.least_layers = 3; }),
            "least_layers is 3, expected at most 2: there are 6 layers for 3 stages");
  EXPECT_EQ(message([](Cut &c) { c.args.least_layers = -1; }), "least_layers is -1, expected at least 0");
  EXPECT_EQ(message([](Cut &c) { c.args.bottleneck_weight = NAN; }), "bottleneck_weight is nan, expected at least 0");
  sl_cut_args args{};
  size_t size;
  EXPECT_EQ(sl_cut_layers_workspace_size(nullptr, &size), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_cut_layers_workspace_size(&args, &size), SL_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(sl_last_error()).substr(0, 9), "size is 0");
  args.size = sizeof args, args.layers = 4;
  EXPECT_EQ(sl_cut_layers_workspace_size(&args, &size), SL_OUT_OF_RANGE);
  EXPECT_STREQ(sl_last_error(), "stages is 0, expected 1 to 4096");
}

struct Share {
  sl_share_args args{};
  std::vector<double> times, fixed;
  std::vector<int64_t> most, shares;
  double longest = -1;

  sl_status run() {
    args.size = sizeof args, args.ranks = static_cast<int64_t>(times.size());
    args.micro_batch_s = times.data(), args.fixed_s = fixed.empty() ? nullptr : fixed.data();
    args.most = most.empty() ? nullptr : most.data();
    shares.assign(times.size(), -1), args.shares = shares.data();
    return sl_share_micro_batches(&args, &longest);
  }
  double end(size_t rank, int64_t share) const {
    return (fixed.empty() ? 0 : fixed[rank]) + static_cast<double>(share) * times[rank];
  }
  // The earliest end of the last rank; infinite where the limits leave no room.
  double best_of_all() const {
    double best = INFINITY;
    auto place = [&](auto &&self, size_t rank, int64_t left, double latest) -> void {
      if (rank == times.size()) {
        if (left == 0) best = std::min(best, latest);
        return;
      }
      int64_t high = most.empty() ? left : std::min(left, most[rank]);
      for (int64_t share = args.least; share <= high; ++share) {
        self(self, rank + 1, left - share, std::max(latest, end(rank, share)));
      }
    };
    place(place, 0, args.micro_batches, 0);
    return best;
  }
};

TEST(ShareMicroBatches, IsTheBestOfAllShares) {
  Random random(5);
  for (int round = 0; round < 3000; ++round) {
    Share share;
    auto ranks = static_cast<size_t>(random.integer(1, 4));
    bool whole = random.chance(0.5);
    auto number = [&](double low, double high) {
      double value = random.uniform(low, high);
      return whole ? std::ceil(value) : value;
    };
    for (size_t r = 0; r < ranks; ++r) share.times.push_back(number(0.2, 4));
    if (random.chance(0.5))
      for (size_t r = 0; r < ranks; ++r) share.fixed.push_back(number(0, 9));
    share.args.micro_batches = random.integer(0, 14);
    share.args.least = random.integer(0, share.args.micro_batches / static_cast<int64_t>(ranks));
    if (random.chance(0.4))
      for (size_t r = 0; r < ranks; ++r) share.most.push_back(share.args.least + random.integer(0, 8));
    double best = share.best_of_all();
    sl_status status = share.run();
    if (std::isinf(best)) {
      ASSERT_EQ(status, SL_OUT_OF_RANGE);
      continue;
    }
    ASSERT_EQ(status, SL_OK) << sl_last_error();
    ASSERT_EQ(std::accumulate(share.shares.begin(), share.shares.end(), int64_t{0}), share.args.micro_batches);
    ASSERT_EQ(share.longest, best) << "round " << round;
    double latest = 0;
    for (size_t r = 0; r < ranks; ++r) {
      latest = std::max(latest, share.end(r, share.shares[r]));
      ASSERT_GE(share.shares[r], share.args.least);
      if (!share.most.empty()) {
        ASSERT_LE(share.shares[r], share.most[r]);
      }
    }
    ASSERT_EQ(share.longest, latest);
  }
}

TEST(ShareMicroBatches, GivesASlowRankLess) {
  Share share;
  share.times = {1, 1, 2, 1}, share.args.micro_batches = 28, share.args.least = 1;
  ASSERT_EQ(share.run(), SL_OK);
  EXPECT_EQ(share.shares, (std::vector<int64_t>{8, 8, 4, 8}));
  EXPECT_EQ(share.longest, 8);
  share.times.assign(3, 1), share.args.micro_batches = 1000000001;
  ASSERT_EQ(share.run(), SL_OK);
  EXPECT_EQ(share.shares, (std::vector<int64_t>{333333334, 333333334, 333333333}));
}

TEST(ShareMicroBatches, RefusesBadInputWithItsValue) {
  auto message = [](auto change) -> std::string {
    Share share;
    share.times = {1, 2}, share.args.micro_batches = 6;
    change(share);
    EXPECT_NE(share.run(), SL_OK);
    return sl_last_error();
  };
  EXPECT_EQ(message([](Share &s) { s.times[1] = 0; }), "micro_batch_s[1] is 0, expected 1e-12 to 1e+09");
  EXPECT_EQ(message([](Share &s) { s.times[0] = NAN; }), "micro_batch_s[0] is nan, expected 1e-12 to 1e+09");
  EXPECT_EQ(message([](Share &s) { s.fixed = {0, -1}; }), "fixed_s[1] is -1, expected 0 to 1e+09");
  EXPECT_EQ(message([](Share &s) { s.times.clear(); }), "ranks is 0, expected 1 to 16384");
  EXPECT_EQ(message([](Share &s) { s.args.micro_batches = -1; }), "micro_batches is -1, expected 0 to 1073741824");
  EXPECT_EQ(message([](Share &s) { s.args.least = 4; }),
            "least is 4, expected 0 to 3: there are 6 micro-batches for 2 ranks");
  EXPECT_EQ(message([](Share &s) { s.most = {2, 3}; }), "most leaves room for 5 micro-batches, expected 6");
  EXPECT_EQ(message([](Share &s) { s.most = {2, -1}; }), "most[1] is -1, expected at least 0");
  EXPECT_EQ(sl_share_micro_batches(nullptr, nullptr), SL_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace sluice_test

// Simulated steps whose times are known: bubbles and activations of even stages against the closed forms of the papers,
// steps worked by hand; bad input.
#include "schedule_problem.h"

namespace sluice_test {
namespace {

struct Even {
  double forward, input, weight;
  double whole() const { return forward + input + weight; }
};
const std::vector<Even> kTimes = {{1, 1, 1}, {1, 2, 0.5}, {0.25, 1, 3}, {2, 1, 1}, {1, 0, 1}};

Simulated simulate_even(const sl_schedule &schedule, const Even &times) {
  Problem problem(schedule, times.forward, times.input, times.weight);
  return simulate(problem);
}

// What a step takes beyond the work of one rank.
double bubble(const sl_schedule &schedule, const Even &times) {
  double work = static_cast<double>(schedule.stages_per_rank * schedule.micro_batches) * times.whole();
  return simulate_even(schedule, times).result.makespan_s - work;
}

TEST(Simulate, HasTheBubbleOfTheBooksWithWholeBackwards) {
  for (const Even &times : kTimes) {
    for (int64_t p = 1; p <= 7; ++p) {
      double expected = static_cast<double>(p - 1) * times.whole();
      for (int64_t m = 1; m <= 16; ++m) {
        for (int64_t kind : {SL_SCHEDULE_GPIPE, SL_SCHEDULE_1F1B}) {
          sl_schedule schedule{kind, p, 1, m};
          EXPECT_NEAR(bubble(schedule, times), expected, 1e-9);
          EXPECT_NEAR(simulate_even(schedule, times).result.bubble_ratio,
                      static_cast<double>(p - 1) / static_cast<double>(m), 1e-12);
        }
      }
      for (int64_t v = 2; v <= 4; ++v) {
        for (int64_t m = p; m <= 4 * p; m += p) {
          sl_schedule schedule{SL_SCHEDULE_INTERLEAVED, p, v, m};
          EXPECT_NEAR(bubble(schedule, times), expected, 1e-9);
          EXPECT_NEAR(simulate_even(schedule, times).result.bubble_ratio,
                      static_cast<double>(p - 1) / static_cast<double>(m * v), 1e-12);
        }
      }
    }
  }
}

// Table 2 of Qi et al.: (p - 1) (T_F + T_B - T_W), where a weight gradient fits into the gap that it is to fill.
TEST(Simulate, HasTheBubbleOfZeroBubbleH1) {
  for (const Even &times : std::vector<Even>{{1, 1, 1}, {1, 2, 0.5}, {1, 1, 0.5}, {2, 3, 1}, {1, 1, 0}}) {
    for (int64_t p = 1; p <= 7; ++p) {
      for (int64_t m = p; m <= 3 * p; ++m) {
        double expected = static_cast<double>(p - 1) * (times.forward + times.input - times.weight);
        EXPECT_NEAR(bubble({SL_SCHEDULE_ZB_H1, p, 1, m}, times), expected, 1e-9)
            << p << " " << m << " " << times.weight;
      }
    }
  }
}

// Section 6 of Qi et al.: no rank waits between its first and its last piece of work. A rank begins a forward after the
// rank before it, which is all that a step takes beyond its work.
TEST(Simulate, HasNoBubbleWithinTheV) {
  for (double unit : {1.0, 0.125}) {
    for (int64_t p = 1; p <= 7; ++p) {
      for (int64_t m = 2 * p; m <= 4 * p; ++m) {
        sl_schedule schedule{SL_SCHEDULE_ZBV, p, 2, m};
        Simulated simulated = simulate_even(schedule, {unit, unit, unit});
        for (const sl_rank_times &rank : simulated.ranks) {
          EXPECT_EQ(rank.wait_s, 0);
          EXPECT_EQ(rank.idle_s, unit * static_cast<double>(p - 1));
        }
        EXPECT_EQ(simulated.result.bubble_ratio, static_cast<double>(p - 1) / static_cast<double>(6 * m));
      }
    }
  }
}

// The most activations that a rank keeps at once; -1 where no formula is known.
int64_t known_peak(const sl_schedule &schedule, int64_t rank) {
  int64_t p = schedule.ranks, v = schedule.stages_per_rank, m = schedule.micro_batches;
  switch (schedule.kind) {
    case SL_SCHEDULE_GPIPE: return m;
    case SL_SCHEDULE_1F1B: return std::min(m, p - rank);
    case SL_SCHEDULE_INTERLEAVED: return m % p ? -1 : std::min(m * v, (v - 1) * p + 2 * (p - 1 - rank) + 1);
    case SL_SCHEDULE_ZB_H1: return v > 1 ? -1 : std::min(m, p);
    default: return m < 2 * p ? -1 : 2 * p;
  }
}

TEST(Simulate, KeepsTheActivationsOfTheBooks) {
  int known = 0;
  for_each_schedule(6, 3, 18, [&](const sl_schedule &schedule) {
    Problem problem(schedule, 1, 1, 1);
    problem.activation.assign(problem.stages(), 8);
    Simulated simulated = simulate(problem);
    for (int64_t rank = 0; rank < schedule.ranks; ++rank) {
      const sl_rank_times &times = simulated.ranks[static_cast<size_t>(rank)];
      int64_t expected = known_peak(schedule, rank);
      if (expected >= 0) {
        EXPECT_EQ(times.peak_activations, expected);
        ++known;
      }
      EXPECT_EQ(times.peak_bytes, static_cast<double>(8 * times.peak_activations));
    }
  });
  EXPECT_GT(known, 1000);
}

TEST(Simulate, CountsBytesThatStayForTheWeights) {
  Problem problem({SL_SCHEDULE_ZB_H1, 2, 1, 4}, 1, 1, 1);
  problem.activation = {10, 100}, problem.held = {3, 1000};
  Simulated simulated = simulate(problem);
  EXPECT_EQ(simulated.ranks[0].peak_bytes, 20);    // F0 F1
  EXPECT_EQ(simulated.ranks[1].peak_bytes, 2000);  // F0 I0 F1 I1, before W0
}

TEST(Simulate, TakesMessagesIntoAccount) {
  Problem problem({SL_SCHEDULE_1F1B, 2, 1, 2}, 1, 1, 1);
  problem.forward_bytes = problem.backward_bytes = {2, 2};
  problem.next = {{0.25, 4}, {0.25, 4}};
  Simulated simulated = simulate(problem);
  auto events = by_piece(simulated);
  EXPECT_EQ((events[{SL_WORK_SEND_FORWARD, 0, 0}].end_s), 1.75);
  EXPECT_EQ((events[{SL_WORK_BACKWARD, 1, 1}].end_s), 7.75);
  EXPECT_EQ((events[{SL_WORK_BACKWARD, 0, 1}].begin_s), 8.5);
  EXPECT_EQ(simulated.result.makespan_s, 10.5);
  EXPECT_EQ(simulated.ranks[1].begin_s, 1.75);
  EXPECT_EQ(simulated.ranks[1].idle_s, 4.5);
  EXPECT_EQ(simulated.ranks[1].wait_s, 0);
  EXPECT_EQ(simulated.result.bubble_ratio, 0.75);
  EXPECT_EQ(simulated.result.bubble_share, 9 / 21.0);

  problem.reduce_bytes = {8, 8};
  simulated = simulate(problem);
  events = by_piece(simulated);
  EXPECT_EQ((events[{SL_WORK_REDUCE, 1, -1}].begin_s), 7.75);
  EXPECT_EQ((events[{SL_WORK_REDUCE, 1, -1}].end_s), 10);
  EXPECT_EQ(simulated.result.compute_s, 10.5);
  EXPECT_EQ(simulated.result.makespan_s, 12.75);

  problem.args.shared_port = 1;
  EXPECT_EQ((by_piece(simulate(problem))[{SL_WORK_REDUCE, 1, -1}].begin_s), 8.25) << "after the message before it";

  problem.args.blocking_sends = 1;
  events = by_piece(simulate(problem));
  EXPECT_EQ((events[{SL_WORK_FORWARD, 0, 1}].begin_s), 1.5) << "once the first message has left";
  EXPECT_EQ((events[{SL_WORK_FORWARD, 1, 1}].begin_s), 5.25);
}

TEST(Simulate, SharesAPort) {
  Problem problem({SL_SCHEDULE_INTERLEAVED, 2, 2, 2}, 0, 0, 1);
  problem.backward_bytes = {1, 1, 1, 1};
  problem.reduce_bytes = {0, 0, 0, 10};
  problem.next = {{0, 1}, {0, 1}};
  struct Case {
    int64_t shared;
    double share, compute, begin, end;
  };
  // Rank 1's reduction of stage 3 meets the two gradients that its stage 1 sends.
  for (const Case &expected : {Case{0, 0, 8, 2, 12}, Case{1, 0.5, 10, 3, 15}, Case{1, 0, 8, 3, 15}}) {
    problem.args.shared_port = expected.shared, problem.args.reduce_share = expected.share;
    Simulated simulated = simulate(problem);
    auto events = by_piece(simulated);
    sl_event reduction = events[{SL_WORK_REDUCE, 3, -1}], message = events[{SL_WORK_SEND_BACKWARD, 1, 0}];
    EXPECT_EQ(simulated.result.compute_s, expected.compute);
    EXPECT_EQ(simulated.result.makespan_s, expected.end);
    EXPECT_EQ(reduction.begin_s, expected.begin);
    EXPECT_EQ(reduction.end_s, expected.end);
    EXPECT_EQ(message.end_s - message.begin_s, expected.share > 0 ? 2 : 1);
  }
}

TEST(Simulate, ServesTwoRanksOverOneLinkInBothDirections) {
  Problem problem({SL_SCHEDULE_INTERLEAVED, 2, 2, 2}, 1, 1, 1);
  problem.forward_bytes = problem.backward_bytes = {8, 8, 8, 8};
  problem.next = {{0, 1}, {0, 1}};
  Simulated simulated = simulate(problem);
  problem.previous = {{0, 1e9}, {0, 1e9}};
  EXPECT_EQ(simulate(problem).result.makespan_s, simulated.result.makespan_s) << "next and previous are the same rank";
}

TEST(Simulate, TakesNoTimeForNothing) {
  Simulated simulated = simulate_even({SL_SCHEDULE_ZBV, 2, 2, 5}, {0, 0, 0});
  EXPECT_EQ(simulated.result.makespan_s, 0);
  EXPECT_EQ(simulated.result.bubble_share, 0);
  EXPECT_EQ(simulated.result.bubble_ratio, 0);
}

class SimulateErrors : public ::testing::Test {
 protected:
  SimulateErrors() {
    args_.size = sizeof args_, args_.schedule = {SL_SCHEDULE_1F1B, 2, 1, 4};
    args_.forward_s = args_.backward_input_s = args_.backward_weight_s = ones_;
    EXPECT_EQ(sl_simulate_sizes(&args_, &args_.workspace_size, &event_count_), SL_OK) << sl_last_error();
    workspace_ = GuardedBuffer(args_.workspace_size);
    args_.workspace = workspace_.data();
    result_.size = sizeof result_;
  }
  template <typename Change>
  std::string message(Change change, sl_status expected = SL_INVALID_ARGUMENT) {
    sl_simulate_args args = args_;
    change(args);
    EXPECT_EQ(sl_simulate(&args, &result_), expected);
    return sl_last_error();
  }
  const double ones_[2] = {1, 1};
  sl_simulate_args args_{};
  sl_simulate_result result_{};
  GuardedBuffer workspace_;
  int64_t event_count_ = 0;
};

TEST_F(SimulateErrors, NameTheArgumentItsValueAndWhatWasExpected) {
  using Args = sl_simulate_args;
  const double bad[] = {1, -2}, nan[] = {NAN, 1}, infinite[] = {1, INFINITY}, none[] = {1, 0};
  const sl_link slow[] = {{0, 1}, {0, 0.5}}, late[] = {{-1, 1}, {0, 1}}, unknown[] = {{0, NAN}, {0, 1}};
  EXPECT_EQ(sl_simulate(&args_, &result_), SL_OK) << sl_last_error();
  EXPECT_EQ(message([](Args &a) { a.size = 8; }).substr(0, 43), "size is 8, expected sizeof(sl_simulate_args");
  EXPECT_EQ(message([](Args &a) { a.schedule.stages_per_rank = 2; }),
            "stages_per_rank is 2, expected 1 with the schedule 1f1b");
  EXPECT_EQ(message([](Args &a) { a.forward_s = nullptr; }), "forward_s is NULL, expected a time for each of 2 stages");
  EXPECT_EQ(message([&](Args &a) { a.forward_s = bad; }), "forward_s[1] is -2, expected 0 to 1e+09");
  EXPECT_EQ(message([&](Args &a) { a.backward_input_s = nan; }), "backward_input_s[0] is nan, expected 0 to 1e+09");
  EXPECT_EQ(message([&](Args &a) { a.backward_weight_s = infinite; }),
            "backward_weight_s[1] is inf, expected 0 to 1e+09");
  EXPECT_EQ(message([&](Args &a) { a.slowdowns = none; }), "slowdowns[1] is 0, expected 1e-06 to 1e+06");
  EXPECT_EQ(message([&](Args &a) { a.forward_bytes = bad; }), "forward_bytes[1] is -2, expected 0 to 1e+18");
  EXPECT_EQ(message([&](Args &a) { a.backward_bytes = bad; }), "backward_bytes[1] is -2, expected 0 to 1e+18");
  EXPECT_EQ(message([&](Args &a) { a.reduce_bytes = nan; }), "reduce_bytes[0] is nan, expected 0 to 1e+18");
  EXPECT_EQ(message([&](Args &a) { a.activation_bytes = bad; }), "activation_bytes[1] is -2, expected 0 to 1e+18");
  EXPECT_EQ(message([&](Args &a) { a.weight_bytes = bad; }), "weight_bytes[1] is -2, expected 0 to 1e+18");
  EXPECT_EQ(message([&](Args &a) { a.next_links = slow; }), "next_links[1].bytes_per_s is 0.5, expected at least 1");
  EXPECT_EQ(message([&](Args &a) { a.previous_links = late; }),
            "previous_links[0].latency_s is -1, expected 0 to 1e+06");
  EXPECT_EQ(message([&](Args &a) { a.reduce_links = unknown; }),
            "reduce_links[0].bytes_per_s is nan, expected at least 1");
  EXPECT_EQ(message([](Args &a) { a.shared_port = 2; }), "shared_port is 2, expected 0 or 1");
  EXPECT_EQ(message([](Args &a) { a.blocking_sends = -1; }), "blocking_sends is -1, expected 0 or 1");
  EXPECT_EQ(message([](Args &a) { a.reduce_share = 1; }), "reduce_share is 1, expected 0 to 0.99");
  EXPECT_EQ(message([](Args &a) { a.workspace = nullptr; }).substr(0, 12), "workspace is");
  EXPECT_NE(message([](Args &a) { a.workspace = static_cast<char *>(a.workspace) + 4; }).find("aligned to 8 bytes"),
            std::string::npos);
  EXPECT_NE(message([](Args &a) { --a.workspace_size; }, SL_OUT_OF_MEMORY).find("expected at least"),
            std::string::npos);
  sl_event event;
  EXPECT_EQ(message([&](Args &a) { a.events = &event, a.event_capacity = event_count_ - 1; }, SL_OUT_OF_MEMORY),
            "event_capacity is 23, expected at least 24");
}

TEST_F(SimulateErrors, CoverTheResultAndTheSizes) {
  size_t size;
  int64_t count;
  EXPECT_EQ(sl_simulate(nullptr, &result_), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_simulate(&args_, nullptr), SL_INVALID_ARGUMENT);
  result_.size = 3;
  EXPECT_EQ(sl_simulate(&args_, &result_), SL_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(sl_last_error()).substr(0, 16), "result.size is 3");
  EXPECT_EQ(sl_simulate_sizes(nullptr, &size, &count), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_simulate_sizes(&args_, nullptr, &count), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "workspace_size is NULL, expected a place for the number");
  EXPECT_EQ(sl_simulate_sizes(&args_, &size, nullptr), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "event_count is NULL, expected a place for the number");
}

}  // namespace
}  // namespace sluice_test

// What the tests of schedules and simulations share: every small schedule, a problem that owns its arrays, and its
// simulation between canaries.
#ifndef SLUICE_TESTS_SCHEDULE_PROBLEM_H
#define SLUICE_TESTS_SCHEDULE_PROBLEM_H

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include <sluice/schedule.h>

#include "support.h"

namespace sluice_test {

inline std::vector<sl_work> order_of(const sl_schedule &schedule, int64_t rank) {
  int64_t count = 0;
  EXPECT_EQ(sl_schedule_work_count(&schedule, &count), SL_OK) << sl_last_error();
  sl_work canary{-7, -7, -7, -7};
  std::vector<sl_work> order(static_cast<size_t>(count) + 1, canary);
  EXPECT_EQ(sl_schedule_order(&schedule, rank, order.data()), SL_OK) << sl_last_error();
  EXPECT_EQ(order.back().kind, canary.kind);
  order.pop_back();
  return order;
}

inline int64_t rank_of(const sl_schedule &schedule, int64_t stage) {
  int64_t rank = -1;
  EXPECT_EQ(sl_schedule_stage_rank(&schedule, stage, &rank), SL_OK) << sl_last_error();
  return rank;
}

inline bool accepts(const sl_schedule &schedule) {
  int64_t count;
  return sl_schedule_work_count(&schedule, &count) == SL_OK;
}

// Every schedule that is allowed up to these sizes.
template <typename Function>
void for_each_schedule(int64_t ranks, int64_t chunks, int64_t micro_batches, Function function) {
  for (int64_t kind = SL_SCHEDULE_GPIPE; kind <= SL_SCHEDULE_ZBV; ++kind)
    for (int64_t p = 1; p <= ranks; ++p)
      for (int64_t v = 1; v <= chunks; ++v)
        for (int64_t m = 1; m <= micro_batches; ++m) {
          sl_schedule schedule{kind, p, v, m};
          if (accepts(schedule)) function(schedule);
        }
}

struct Problem {
  sl_simulate_args args{};
  std::vector<double> forward, input, weight, slow, forward_bytes, backward_bytes, reduce_bytes, activation, held;
  std::vector<sl_link> next, previous, reduce;

  size_t stages() const { return static_cast<size_t>(args.schedule.ranks * args.schedule.stages_per_rank); }
  size_t ranks() const { return static_cast<size_t>(args.schedule.ranks); }

  Problem(sl_schedule schedule, double f, double i, double w) {
    args.size = sizeof args, args.schedule = schedule;
    forward.assign(stages(), f), input.assign(stages(), i), weight.assign(stages(), w);
  }
  // Uneven stages, stragglers, links and reductions: each there or not.
  Problem(sl_schedule schedule, Random &random) : Problem(schedule, 1, 1, 1) {
    auto fill = [&](std::vector<double> &values, size_t count, double low, double high) {
      values.resize(count);
      for (double &value : values) value = random.chance(0.1) ? low : random.uniform(low, high);
    };
    auto links = [&](std::vector<sl_link> &values) {
      values.resize(ranks());
      for (sl_link &link : values) link = {random.uniform(0, 0.3), random.uniform(1, 20)};
    };
    fill(forward, stages(), 0, 2), fill(input, stages(), 0, 2), fill(weight, stages(), 0, 2);
    if (random.chance(0.5)) fill(slow, ranks(), 0.5, 3);
    if (random.chance(0.8)) fill(forward_bytes, stages(), 0, 10);
    if (random.chance(0.8)) fill(backward_bytes, stages(), 0, 10);
    if (random.chance(0.7)) fill(reduce_bytes, stages(), 0, 30);
    if (random.chance(0.8)) links(next);
    if (random.chance(0.5)) links(previous);
    if (random.chance(0.5)) links(reduce);
    fill(activation, stages(), 1, 9);
    if (random.chance(0.5)) fill(held, stages(), 0, 12);
    args.shared_port = random.chance(0.5), args.reduce_share = random.pick<double>({0, 0.5, 0.9});
    args.blocking_sends = random.chance(0.3);
  }
};

struct Simulated {
  sl_simulate_result result{};
  std::vector<sl_event> events;
  std::vector<sl_rank_times> ranks;
};

inline Simulated simulate(Problem &problem) {
  sl_simulate_args &args = problem.args;
  auto data = [](std::vector<double> &values) { return values.empty() ? nullptr : values.data(); };
  auto links = [](std::vector<sl_link> &values) { return values.empty() ? nullptr : values.data(); };
  args.forward_s = data(problem.forward), args.backward_input_s = data(problem.input);
  args.backward_weight_s = data(problem.weight), args.slowdowns = data(problem.slow);
  args.forward_bytes = data(problem.forward_bytes), args.backward_bytes = data(problem.backward_bytes);
  args.reduce_bytes = data(problem.reduce_bytes);
  args.activation_bytes = data(problem.activation), args.weight_bytes = data(problem.held);
  args.next_links = links(problem.next), args.previous_links = links(problem.previous);
  args.reduce_links = links(problem.reduce);
  size_t workspace_size = 0;
  int64_t event_count = 0;
  EXPECT_EQ(sl_simulate_sizes(&args, &workspace_size, &event_count), SL_OK) << sl_last_error();
  GuardedBuffer workspace(workspace_size), events(static_cast<size_t>(event_count) * sizeof(sl_event));
  Simulated simulated;
  simulated.ranks.resize(problem.ranks());
  args.workspace = workspace.data(), args.workspace_size = workspace_size;
  args.events = static_cast<sl_event *>(events.data()), args.event_capacity = event_count;
  args.ranks = simulated.ranks.data();
  simulated.result.size = sizeof simulated.result;
  EXPECT_EQ(sl_simulate(&args, &simulated.result), SL_OK) << sl_last_error();
  EXPECT_TRUE(workspace.intact() && events.intact());
  EXPECT_EQ(simulated.result.event_count, event_count);
  simulated.events.assign(args.events, args.events + event_count);
  args.workspace = nullptr, args.events = nullptr, args.ranks = nullptr;
  return simulated;
}

using Piece = std::tuple<int32_t, int32_t, int32_t>;  // kind, stage, micro-batch

inline Piece piece(const sl_work &work) { return {work.kind, work.stage, work.micro_batch}; }

inline bool is_work(const sl_event &event) { return event.work.kind <= SL_WORK_BACKWARD_WEIGHT; }

inline std::map<Piece, sl_event> by_piece(const Simulated &simulated) {
  std::map<Piece, sl_event> events;
  for (const sl_event &event : simulated.events) {
    EXPECT_TRUE(events.emplace(piece(event.work), event).second) << "twice";
  }
  return events;
}

// The kind of backward that hands on the gradient.
inline int32_t backward_kind(const sl_schedule &schedule) {
  bool split = schedule.kind == SL_SCHEDULE_ZB_H1 || schedule.kind == SL_SCHEDULE_ZBV;
  return split ? SL_WORK_BACKWARD_INPUT : SL_WORK_BACKWARD;
}

}  // namespace sluice_test

#endif

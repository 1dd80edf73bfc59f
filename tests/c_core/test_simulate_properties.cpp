// What holds for every simulated step: all work is done once and waits for what it needs, no step beats its critical
// path, and nothing that gets faster makes a step slower.
#include "schedule_problem.h"

namespace sluice_test {
namespace {

constexpr double kRounding = 1e-9;

// Random sizes of every schedule, with uneven stages, stragglers and links.
template <typename Function>
void for_random_problems(int rounds, Function function) {
  Random random(19);
  for (int round = 0; round < rounds; ++round) {
    sl_schedule schedule{random.integer(0, 4), random.integer(1, 6), random.integer(1, 4), random.integer(1, 16)};
    if (!accepts(schedule)) continue;
    Problem problem(schedule, random);
    SCOPED_TRACE(::testing::Message() << "round " << round << ": " << sl_schedule_name(schedule.kind) << " "
                                      << schedule.ranks << " " << schedule.stages_per_rank << " "
                                      << schedule.micro_batches);
    function(problem, random);
    if (::testing::Test::HasFailure()) return;
  }
}

double slowdown(const Problem &problem, int64_t rank) {
  return problem.slow.empty() ? 1 : problem.slow[static_cast<size_t>(rank)];
}

double duration(const Problem &problem, const sl_work &work) {
  auto stage = static_cast<size_t>(work.stage);
  double input = problem.input[stage], weight = problem.weight[stage], times = 0;
  if (work.kind == SL_WORK_FORWARD) times = problem.forward[stage];
  if (work.kind == SL_WORK_BACKWARD) times = input + weight;
  if (work.kind == SL_WORK_BACKWARD_INPUT) times = input;
  if (work.kind == SL_WORK_BACKWARD_WEIGHT) times = weight;
  return times * slowdown(problem, work.rank);
}

// The link of a message from stage to target, and what it carries.
sl_link link_of(const Problem &problem, int64_t stage, int64_t target) {
  const sl_schedule &schedule = problem.args.schedule;
  int64_t from = rank_of(schedule, stage), to = rank_of(schedule, target);
  bool back = to != (from + 1) % schedule.ranks && !problem.previous.empty();
  const std::vector<sl_link> &links = back ? problem.previous : problem.next;
  return links.empty() ? sl_link{0, INFINITY} : links[static_cast<size_t>(from)];
}

double carried(const Problem &problem, int64_t stage, int64_t target) {
  const std::vector<double> &bytes = target > stage ? problem.forward_bytes : problem.backward_bytes;
  return bytes.empty() ? 0 : bytes[static_cast<size_t>(stage)];
}

// The shortest time between the end of the work at one stage and its arrival at the next.
double least_delay(const Problem &problem, int64_t stage, int64_t target) {
  const sl_schedule &schedule = problem.args.schedule;
  if (rank_of(schedule, stage) == rank_of(schedule, target)) return 0;
  sl_link link = link_of(problem, stage, target);
  return carried(problem, stage, target) / link.bytes_per_s + link.latency_s;
}

TEST(SimulateProperties, WorkIsDoneOnceInOrderAndAfterWhatItNeeds) {
  for_random_problems(1500, [](Problem &problem, Random &) {
    const sl_schedule &schedule = problem.args.schedule;
    Simulated simulated = simulate(problem);
    auto events = by_piece(simulated);
    auto last_stage = static_cast<int32_t>(problem.stages() - 1);
    for (int64_t rank = 0; rank < schedule.ranks; ++rank) {
      double free = 0;
      for (const sl_work &work : order_of(schedule, rank)) {
        ASSERT_TRUE(events.count(piece(work)));
        const sl_event &event = events[piece(work)];
        ASSERT_GE(event.begin_s, free);
        ASSERT_NEAR(event.end_s - event.begin_s, duration(problem, work), kRounding);
        free = event.end_s;
        if (work.kind == SL_WORK_BACKWARD_WEIGHT) continue;
        bool is_forward = work.kind == SL_WORK_FORWARD;
        if (work.stage == (is_forward ? 0 : last_stage)) continue;
        int32_t source = is_forward ? work.stage - 1 : work.stage + 1;
        const sl_event &made = events[{work.kind, source, work.micro_batch}];
        ASSERT_GE(event.begin_s, made.end_s + least_delay(problem, source, work.stage) - kRounding);
        if (rank_of(schedule, source) == rank) continue;
        int32_t kind = is_forward ? SL_WORK_SEND_FORWARD : SL_WORK_SEND_BACKWARD;
        ASSERT_TRUE(events.count({kind, source, work.micro_batch}));
        const sl_event &message = events[{kind, source, work.micro_batch}];
        ASSERT_GE(message.begin_s, made.end_s);
        ASSERT_GE(event.begin_s, message.end_s);
      }
    }
  });
}

TEST(SimulateProperties, NoRankBeginsLaterThanItMust) {
  for_random_problems(800, [](Problem &problem, Random &) {
    const sl_schedule &schedule = problem.args.schedule;
    problem.args.shared_port = problem.args.blocking_sends = 0;
    Simulated simulated = simulate(problem);
    auto events = by_piece(simulated);
    for (int64_t rank = 0; rank < schedule.ranks; ++rank) {
      double free = 0;
      std::map<std::pair<int64_t, bool>, double> link_free;
      for (const sl_work &work : order_of(schedule, rank)) {
        double ready = free;
        bool is_forward = work.kind == SL_WORK_FORWARD, is_weight = work.kind == SL_WORK_BACKWARD_WEIGHT;
        int32_t source = is_forward ? work.stage - 1 : work.stage + 1;
        int32_t target = is_forward ? work.stage + 1 : work.stage - 1;
        auto stages = static_cast<int32_t>(problem.stages());
        if (!is_weight && source >= 0 && source < stages) {
          int32_t kind = is_forward ? SL_WORK_SEND_FORWARD : SL_WORK_SEND_BACKWARD;
          if (rank_of(schedule, source) == rank) kind = work.kind;
          ready = std::max(ready, events[{kind, source, work.micro_batch}].end_s);
        }
        const sl_event &event = events[piece(work)];
        ASSERT_EQ(event.begin_s, ready);
        free = event.end_s;
        if (is_weight || target < 0 || target >= stages || rank_of(schedule, target) == rank) continue;
        int32_t kind = is_forward ? SL_WORK_SEND_FORWARD : SL_WORK_SEND_BACKWARD;
        const sl_event &message = events[{kind, work.stage, work.micro_batch}];
        sl_link link = link_of(problem, work.stage, target);
        bool next = rank_of(schedule, target) == (rank + 1) % schedule.ranks;
        double &left = link_free[{rank, next}];
        ASSERT_EQ(message.begin_s, std::max(left, event.end_s));
        left = message.begin_s + carried(problem, work.stage, target) / link.bytes_per_s;
        ASSERT_NEAR(message.end_s, left + link.latency_s, kRounding);
      }
    }
  });
}

TEST(SimulateProperties, NoStepBeatsItsCriticalPathOrTheWorkOfARank) {
  for_random_problems(1500, [](Problem &problem, Random &) {
    const sl_schedule &schedule = problem.args.schedule;
    Simulated simulated = simulate(problem);
    auto stages = static_cast<int32_t>(problem.stages());
    double path = 0, busy = 0, idle = 0;
    for (int32_t stage = 0; stage < stages; ++stage) {  // one micro-batch down and up again
      auto rank = static_cast<int32_t>(rank_of(schedule, stage));
      path += duration(problem, {SL_WORK_FORWARD, rank, stage, 0});
      path += duration(problem, {backward_kind(schedule), rank, stage, 0});
      if (stage + 1 < stages) path += least_delay(problem, stage, stage + 1) + least_delay(problem, stage + 1, stage);
    }
    const sl_simulate_result &result = simulated.result;
    ASSERT_GE(result.compute_s, path - kRounding);
    ASSERT_GE(result.makespan_s, result.compute_s);
    for (int64_t rank = 0; rank < schedule.ranks; ++rank) {
      const sl_rank_times &times = simulated.ranks[static_cast<size_t>(rank)];
      double work = 0;
      for (const sl_work &one : order_of(schedule, rank)) work += duration(problem, one);
      ASSERT_NEAR(times.busy_s, work, kRounding);
      ASSERT_GE(result.compute_s, times.busy_s - kRounding);
      ASSERT_NEAR(times.busy_s + times.idle_s, result.compute_s, kRounding);
      ASSERT_GE(times.idle_s, times.wait_s - kRounding);
      ASSERT_LE(times.end_s, result.compute_s);
      busy += times.busy_s, idle += times.idle_s;
    }
    ASSERT_NEAR(result.bubble_ratio * busy, idle, 1e-6);
  });
}

// What a rank's messages are on its port: from setting out to having left.
std::vector<std::pair<double, double>> messages_of(const Problem &problem, const Simulated &simulated, int64_t rank) {
  std::vector<std::pair<double, double>> messages;
  for (const sl_event &event : simulated.events) {
    bool forward = event.work.kind == SL_WORK_SEND_FORWARD;
    if (event.work.rank != rank || (!forward && event.work.kind != SL_WORK_SEND_BACKWARD)) continue;
    sl_link link = link_of(problem, event.work.stage, event.work.stage + (forward ? 1 : -1));
    messages.emplace_back(event.begin_s, event.end_s - link.latency_s);
  }
  return messages;
}

TEST(SimulateProperties, ReductionsGetTheirBytesThrough) {
  for_random_problems(1500, [](Problem &problem, Random &) {
    if (problem.reduce_bytes.empty()) return;
    const sl_schedule &schedule = problem.args.schedule;
    Simulated simulated = simulate(problem);
    auto events = by_piece(simulated);
    const std::vector<sl_link> &links = problem.reduce.empty() ? problem.next : problem.reduce;
    int32_t weight = backward_kind(schedule) == SL_WORK_BACKWARD ? SL_WORK_BACKWARD : SL_WORK_BACKWARD_WEIGHT;
    auto last = static_cast<int32_t>(schedule.micro_batches - 1);
    for (int64_t rank = 0; rank < schedule.ranks; ++rank) {
      sl_link link = links.empty() ? sl_link{0, INFINITY} : links[static_cast<size_t>(rank)];
      auto messages = messages_of(problem, simulated, rank);
      double before = 0;  // when the reduction before has left the port
      for (const sl_event &event : simulated.events) {
        if (event.work.rank != rank || event.work.kind != SL_WORK_REDUCE) continue;
        double begin = event.begin_s, left = event.end_s - link.latency_s, served = left - begin;
        double ready = events[{weight, event.work.stage, last}].end_s;
        ASSERT_GE(begin, std::max(ready, before) - kRounding);
        ASSERT_LE(event.end_s, simulated.result.makespan_s);
        if (problem.args.shared_port) {
          for (auto [out, gone] : messages) {
            double overlap = std::min(gone, left) - std::max(out, begin);
            if (overlap > 0) served -= (1 - problem.args.reduce_share) * overlap;
          }
        } else {
          ASSERT_NEAR(begin, std::max(ready, before), kRounding);
        }
        double needed = problem.reduce_bytes[static_cast<size_t>(event.work.stage)] / link.bytes_per_s;
        ASSERT_NEAR(served, needed, 1e-7);
        before = left;
      }
    }
  });
}

// What comes after a change that can only help: the step must not take longer.
void expect_no_slower(Problem &before, Problem &after) {
  Simulated slow = simulate(before), fast = simulate(after);
  ASSERT_LE(fast.result.compute_s, slow.result.compute_s * (1 + kRounding) + kRounding);
  ASSERT_LE(fast.result.makespan_s, slow.result.makespan_s * (1 + kRounding) + kRounding);
}

TEST(SimulateProperties, AFasterLinkIsNeverSlower) {
  for_random_problems(3000, [](Problem &problem, Random &random) {
    Problem after = problem;
    for (auto *links : {&after.next, &after.previous, &after.reduce})
      for (sl_link &link : *links) {
        if (random.chance(0.4)) link.bytes_per_s *= random.uniform(1, 4);
        if (random.chance(0.4)) link.latency_s *= random.uniform(0, 1);
      }
    expect_no_slower(problem, after);
  });
}

TEST(SimulateProperties, ASlowerRankOrStageIsNeverFaster) {
  for_random_problems(3000, [](Problem &problem, Random &random) {
    Problem after = problem;
    for (double &slow : after.slow)
      if (random.chance(0.4)) slow *= random.uniform(0.3, 1);
    for (auto *times : {&after.forward, &after.input, &after.weight})
      for (double &time : *times)
        if (random.chance(0.2)) time *= random.uniform(0.3, 1);
    expect_no_slower(problem, after);
  });
}

TEST(SimulateProperties, ContentionIsNeverFaster) {
  for_random_problems(3000, [](Problem &problem, Random &random) {
    Problem after = problem;
    if (random.chance(0.5)) {
      after.args.shared_port = 0;
    } else {
      for (double &bytes : after.reduce_bytes)
        if (random.chance(0.5)) bytes *= random.uniform(0, 1);
      if (random.chance(0.3)) after.reduce_bytes.clear();
    }
    if (random.chance(0.3)) after.args.blocking_sends = 0;
    expect_no_slower(problem, after);
  });
}

TEST(SimulateProperties, ComesToTheSameBitsWithoutTheExtras) {
  for_random_problems(300, [](Problem &problem, Random &) {
    Simulated with = simulate(problem);
    sl_simulate_args args = problem.args;
    GuardedBuffer workspace(args.workspace_size, 8);
    args.workspace = workspace.data();
    sl_simulate_result result{};
    result.size = sizeof result;
    ASSERT_EQ(sl_simulate(&args, &result), SL_OK) << sl_last_error();
    ASSERT_EQ(std::memcmp(&result, &with.result, sizeof result), 0);
    ASSERT_TRUE(workspace.intact());
  });
}

// A standstill is an error of the simulation, which simulate() expects to succeed.
TEST(SimulateProperties, NoSmallScheduleComesToAStandstill) {
  int count = 0;
  for_each_schedule(7, 4, 16, [&](const sl_schedule &schedule) {
    Problem problem(schedule, 1, 1, 1);
    simulate(problem);
    ++count;
  });
  EXPECT_GT(count, 900);
}

}  // namespace
}  // namespace sluice_test

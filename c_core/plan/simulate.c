/* Simulates a step. Each rank goes through its order as far as what it needs is there, and is woken by what comes in.
 * Since the order of work on every rank and of messages on every link is fixed beforehand, each time is a maximum of
 * sums of times that are known then: ranks may run ahead of one another, and no queue sorted by time is needed. */
#include "plan/simulate.h"

#include <string.h>

#include "plan/port.h"
#include "plan/schedule.h"
#include "runtime/arena.h"
#include "runtime/status.h"

typedef struct rank_state {
  sl_schedule_cursor cursor;
  sl_work work; /* the next piece, while there is one */
  bool has_work, queued;
  double free_s; /* when it may begin the next piece */
  double slowdown;
  sl_port port;
  sl_rank_times times;
  double bytes;        /* kept now */
  int64_t activations; /* kept now */
} rank_state;

typedef struct simulation {
  const sl_simulate_args *args;
  int64_t stages, micro_batches, event_count;
  double compute_s;
  rank_state *ranks;
  int64_t *queue; /* ranks that can go on, last in first out */
  int64_t queued;
  double *ready_s[2];  /* [stages, micro_batches] when the output of the stage before, and the gradient, is there */
  int64_t *arrived[2]; /* [stages] how many of these have come */
} simulation;

enum { OUTPUT = 0, GRADIENT = 1 };

static void cut_workspace(simulation *sim, sl_arena *arena) {
  const sl_schedule *schedule = &sim->args->schedule;
  int64_t p = schedule->ranks, pieces = sim->stages * schedule->micro_batches;
  sim->ranks = sl_arena_take(arena, p, sizeof *sim->ranks);
  sim->queue = sl_arena_take(arena, p, sizeof *sim->queue);
  sl_reduction *reductions = sl_arena_take(arena, sim->stages, sizeof *reductions);
  for (int i = 0; i < 2; ++i) {
    sim->ready_s[i] = sl_arena_take(arena, pieces, sizeof(double));
    sim->arrived[i] = sl_arena_take(arena, sim->stages, sizeof(int64_t));
  }
  for (int64_t r = 0; reductions && sim->ranks && r < p; ++r) {
    sim->ranks[r].port.queue = reductions + r * schedule->stages_per_rank;
  }
}

static simulation make_simulation(const sl_simulate_args *args) {
  return (simulation){.args = args,
                      .stages = args->schedule.ranks * args->schedule.stages_per_rank,
                      .micro_batches = args->schedule.micro_batches};
}

size_t sl_simulate_workspace(const sl_simulate_args *args) {
  simulation sim = make_simulation(args);
  sl_arena arena = sl_arena_make(NULL, 0);
  cut_workspace(&sim, &arena);
  return arena.overflow ? 0 : arena.used;
}

static void record(simulation *sim, sl_work work, double begin, double end) {
  if (sim->args->events) sim->args->events[sim->event_count] = (sl_event){work, begin, end};
  ++sim->event_count;
}

static void wake(simulation *sim, int64_t rank) {
  rank_state *state = &sim->ranks[rank];
  if (state->queued || !state->has_work) return;
  state->queued = true;
  sim->queue[sim->queued++] = rank;
}

static double value_or(const double *values, int64_t index, double otherwise) {
  return values ? values[index] : otherwise;
}

/* Hands a result to the stage that needs it: gives when this rank may go on. */
static double deliver(simulation *sim, rank_state *state, int what, int64_t stage, double end) {
  const sl_simulate_args *args = sim->args;
  int64_t target = what == OUTPUT ? stage + 1 : stage - 1, from = state->work.rank;
  if (target < 0 || target == sim->stages) return end;
  int64_t to = sl_schedule_rank_of(&args->schedule, target);
  double arrival = end, go_on = end;
  if (to != from) {
    int direction = to == (from + 1) % args->schedule.ranks ? 0 : 1;
    const sl_link *links = direction && args->previous_links ? args->previous_links : args->next_links;
    double bytes = value_or(what == OUTPUT ? args->forward_bytes : args->backward_bytes, stage, 0), left;
    double begin = sl_port_send(&state->port, direction, end, links ? bytes / links[from].bytes_per_s : 0, &left);
    arrival = left + (links ? links[from].latency_s : 0);
    if (args->blocking_sends) go_on = left;
    int32_t kind = what == OUTPUT ? SL_WORK_SEND_FORWARD : SL_WORK_SEND_BACKWARD;
    record(sim, (sl_work){kind, (int32_t)from, (int32_t)stage, state->work.micro_batch}, begin, arrival);
  }
  sim->ready_s[what][target * sim->micro_batches + state->work.micro_batch] = arrival;
  ++sim->arrived[what][target];
  if (to != from) wake(sim, to);
  return go_on;
}

static void queue_reduction(simulation *sim, rank_state *state, int64_t stage, double ready) {
  const sl_simulate_args *args = sim->args;
  if (!args->reduce_bytes) return;
  const sl_link *links = args->reduce_links ? args->reduce_links : args->next_links;
  double needed = links ? args->reduce_bytes[stage] / links[state->work.rank].bytes_per_s : 0;
  sl_port_queue(&state->port, stage, ready, needed);
}

static void keep(rank_state *state, int64_t activations, double bytes) {
  sl_rank_times *times = &state->times;
  state->activations += activations, state->bytes += bytes;
  if (state->activations > times->peak_activations) times->peak_activations = state->activations;
  if (state->bytes > times->peak_bytes) times->peak_bytes = state->bytes;
}

/* Whether what the next piece of work needs is known, and from when on it is there. */
static bool find_ready(const simulation *sim, const sl_work *work, double *ready) {
  *ready = 0;
  if (work->kind == SL_WORK_BACKWARD_WEIGHT) return true;
  int what = work->kind == SL_WORK_FORWARD ? OUTPUT : GRADIENT;
  if (work->stage == (what == OUTPUT ? 0 : sim->stages - 1)) return true;
  if (sim->arrived[what][work->stage] <= work->micro_batch) return false; /* they arrive in their order */
  *ready = sim->ready_s[what][work->stage * sim->micro_batches + work->micro_batch];
  return true;
}

static double find_duration(const sl_simulate_args *args, const sl_work *work) {
  switch (work->kind) {
    case SL_WORK_FORWARD: return args->forward_s[work->stage];
    case SL_WORK_BACKWARD: return args->backward_input_s[work->stage] + args->backward_weight_s[work->stage];
    case SL_WORK_BACKWARD_INPUT: return args->backward_input_s[work->stage];
    default: return args->backward_weight_s[work->stage];
  }
}

static void do_work(simulation *sim, rank_state *state, double ready) {
  const sl_simulate_args *args = sim->args;
  const sl_work work = state->work;
  double begin = ready > state->free_s ? ready : state->free_s;
  double duration = find_duration(args, &work) * state->slowdown, end = begin + duration;
  if (state->times.begin_s < 0) state->times.begin_s = begin;
  state->times.busy_s += duration, state->times.end_s = end;
  record(sim, work, begin, end);
  double kept = value_or(args->activation_bytes, work.stage, 0);
  double kept_for_weight = value_or(args->weight_bytes, work.stage, kept);
  state->free_s = end;
  switch (work.kind) {
    case SL_WORK_FORWARD:
      keep(state, 1, kept);
      state->free_s = deliver(sim, state, OUTPUT, work.stage, end);
      break;
    case SL_WORK_BACKWARD:
      keep(state, -1, -kept);
      state->free_s = deliver(sim, state, GRADIENT, work.stage, end);
      break;
    case SL_WORK_BACKWARD_INPUT:
      keep(state, 0, kept_for_weight - kept);
      state->free_s = deliver(sim, state, GRADIENT, work.stage, end);
      break;
    default: keep(state, -1, -kept_for_weight);
  }
  bool has_weight_gradient = work.kind == SL_WORK_BACKWARD || work.kind == SL_WORK_BACKWARD_WEIGHT;
  if (has_weight_gradient && work.micro_batch == sim->micro_batches - 1) queue_reduction(sim, state, work.stage, end);
}

static void run_rank(simulation *sim, rank_state *state) {
  double ready;
  while (state->has_work && find_ready(sim, &state->work, &ready)) {
    do_work(sim, state, ready);
    state->has_work = sl_schedule_next(&state->cursor, &state->work);
  }
}

static void begin_ranks(simulation *sim) {
  const sl_simulate_args *args = sim->args;
  for (int i = 0; i < 2; ++i) memset(sim->arrived[i], 0, (size_t)sim->stages * sizeof(int64_t));
  for (int64_t r = args->schedule.ranks - 1; r >= 0; --r) {
    rank_state *state = &sim->ranks[r];
    sl_reduction *reductions = state->port.queue;
    *state = (rank_state){.cursor = sl_schedule_begin(&args->schedule, r), .slowdown = value_or(args->slowdowns, r, 1)};
    state->port.queue = reductions, state->port.shared = args->shared_port != 0;
    state->port.reduce_share = args->reduce_share;
    state->times.begin_s = -1;
    state->has_work = sl_schedule_next(&state->cursor, &state->work);
    wake(sim, r);
  }
}

/* The rank's reductions as events; gives when the last one has arrived. */
static double finish_reductions(simulation *sim, int64_t rank) {
  const sl_simulate_args *args = sim->args;
  sl_port *port = &sim->ranks[rank].port;
  const sl_link *links = args->reduce_links ? args->reduce_links : args->next_links;
  double latency = links ? links[rank].latency_s : 0, last = sl_port_finish(port);
  for (int64_t i = 0; i < port->count; ++i) {
    const sl_reduction *reduction = &port->queue[i];
    sl_work work = {SL_WORK_REDUCE, (int32_t)rank, (int32_t)reduction->stage, -1};
    record(sim, work, reduction->begin_s, reduction->end_s + latency);
  }
  return port->count ? last + latency : 0;
}

static double at_least_0(double value) { return value > 0 ? value : 0; }

static void summarise(simulation *sim, sl_simulate_result *result) {
  int64_t ranks = sim->args->schedule.ranks;
  double busy = 0, idle = 0;
  result->compute_s = result->makespan_s = 0;
  for (int64_t r = 0; r < ranks; ++r) {
    double end = sim->ranks[r].times.end_s;
    if (end > result->compute_s) result->compute_s = end;
  }
  result->makespan_s = result->compute_s;
  for (int64_t r = 0; r < ranks; ++r) {
    sl_rank_times *times = &sim->ranks[r].times;
    times->idle_s = at_least_0(result->compute_s - times->busy_s);
    times->wait_s = at_least_0(times->end_s - times->begin_s - times->busy_s);
    busy += times->busy_s, idle += times->idle_s;
    if (sim->args->ranks) sim->args->ranks[r] = *times;
    double reduced = finish_reductions(sim, r);
    if (reduced > result->makespan_s) result->makespan_s = reduced;
  }
  result->bubble_share = result->compute_s > 0 ? idle / ((double)ranks * result->compute_s) : 0;
  result->bubble_ratio = busy > 0 ? idle / busy : 0;
  result->event_count = sim->event_count;
}

sl_status sl_simulate_sizes(const sl_simulate_args *args, size_t *workspace_size, int64_t *event_count) {
  SL_CHECK(sl_simulate_validate_schedule(args));
  SL_REQUIRE(workspace_size && event_count, SL_INVALID_ARGUMENT, "%s is NULL, expected a place for the number",
             workspace_size ? "event_count" : "workspace_size");
  *workspace_size = sl_simulate_workspace(args);
  *event_count = sl_simulate_count_events(args);
  return SL_OK;
}

sl_status sl_simulate(const sl_simulate_args *args, sl_simulate_result *result) {
  SL_CHECK(sl_simulate_validate(args, result));
  simulation sim = make_simulation(args);
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  cut_workspace(&sim, &arena);
  begin_ranks(&sim);
  while (sim.queued > 0) {
    rank_state *state = &sim.ranks[sim.queue[--sim.queued]];
    state->queued = false;
    run_rank(&sim, state);
  }
  summarise(&sim, result);
  SL_REQUIRE(sim.event_count == sl_simulate_count_events(args), SL_INTERNAL,
             "the schedule %s with %lld ranks and %lld micro-batches comes to a standstill: %lld of %lld events",
             sl_schedule_name(args->schedule.kind), (long long)args->schedule.ranks,
             (long long)args->schedule.micro_batches, (long long)sim.event_count,
             (long long)sl_simulate_count_events(args));
  return SL_OK;
}

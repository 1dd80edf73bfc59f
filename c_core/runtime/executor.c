/* The serial executor, and dynamic scheduling of tasks over any executor. */
#include "runtime/executor.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#else
static void sched_yield(void) {}
#endif

static void run_serially(void *self, int64_t count, sl_range_function function, void *context) {
  (void)self;
  if (count > 0) function(context, 0, count);
}

const sl_executor *sl_serial_executor(void) {
  static const sl_executor serial = {run_serially, NULL, 1};
  return &serial;
}

typedef struct task_queue {
  _Atomic int64_t next;
  int64_t count;
  sl_task_function function;
  void *context;
} task_queue;

static void drain_tasks(void *context, int64_t begin, int64_t end) {
  task_queue *queue = context;
  for (int64_t worker = begin; worker < end; ++worker) {
    for (;;) {
      int64_t task = atomic_fetch_add_explicit(&queue->next, 1, memory_order_relaxed);
      if (task >= queue->count) break;
      queue->function(queue->context, worker, task);
    }
  }
}

int64_t sl_executor_workers(const sl_executor *executor) {
  return executor && executor->threads > 1 ? executor->threads : 1;
}

void sl_run_tasks(const sl_executor *executor, int64_t count, sl_task_function function, void *context) {
  if (count <= 0) return;
  if (!executor) executor = sl_serial_executor();
  task_queue queue = {0, count, function, context};
  int64_t workers = sl_executor_workers(executor);
  executor->parallel_for(executor->self, workers < count ? workers : count, drain_tasks, &queue);
}

void sl_wait_a_turn(int64_t turn) {
  enum { SPINS = 100 }; /* from then on another thread may be waiting for this processor */
  if (turn >= SPINS) {
    sched_yield();
    return;
  }
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

typedef struct stage_queue {
  const sl_stage *stages;
  int count;
  struct {
    _Atomic int64_t next, ended;
    atomic_bool over;
  } progress[SL_MOST_STAGES];
} stage_queue;

/* No worker can wait for ever, in whatever order they run: a task that was taken is being worked on. */
static void drain_stages(void *context, int64_t begin, int64_t end) {
  stage_queue *queue = context;
  for (int64_t worker = begin; worker < end; ++worker) {
    for (int i = 0; i < queue->count; ++i) {
      const sl_stage *stage = &queue->stages[i];
      if (stage->count <= 0) continue;
      for (;;) {
        int64_t task = atomic_fetch_add_explicit(&queue->progress[i].next, 1, memory_order_relaxed);
        if (task >= stage->count) break;
        stage->function(stage->context, worker, task);
        int64_t ended = atomic_fetch_add_explicit(&queue->progress[i].ended, 1, memory_order_acq_rel) + 1;
        if (ended < stage->count) continue;
        if (stage->after) stage->after(stage->context);
        atomic_store_explicit(&queue->progress[i].over, true, memory_order_release);
      }
      for (int64_t turn = 0; !atomic_load_explicit(&queue->progress[i].over, memory_order_acquire); ++turn) {
        sl_wait_a_turn(turn);
      }
    }
  }
}

void sl_run_stages(const sl_executor *executor, const sl_stage *stages, int count) {
  if (!executor) executor = sl_serial_executor();
  stage_queue queue = {stages, count, {{0}}};
  int64_t workers = sl_executor_workers(executor), most = 0;
  for (int i = 0; i < count; ++i) most = stages[i].count > most ? stages[i].count : most;
  if (most == 0) return;
  executor->parallel_for(executor->self, workers < most ? workers : most, drain_stages, &queue);
}

/* All tasks of all rounds are numbered in the order in which they may begin. */
typedef struct round_queue {
  const sl_stage *stages;
  int count;
  int64_t round_tasks, tasks;
  _Atomic int64_t next, ended;
} round_queue;

/* The tasks below a stage's first have all ended where as many have ended at all: none of the others may have begun.
 * No worker can wait for ever: what it waits for was taken before, and is being worked on. */
static void drain_rounds(void *context, int64_t begin, int64_t end) {
  round_queue *queue = context;
  for (int64_t worker = begin; worker < end; ++worker) {
    for (;;) {
      int64_t task = atomic_fetch_add_explicit(&queue->next, 1, memory_order_relaxed);
      if (task >= queue->tasks) break;
      int64_t round = task / queue->round_tasks, first = round * queue->round_tasks;
      const sl_stage *stage = queue->stages;
      for (; task >= first + stage->count; ++stage) first += stage->count;
      for (int64_t turn = 0; atomic_load_explicit(&queue->ended, memory_order_acquire) < first; ++turn) {
        sl_wait_a_turn(turn);
      }
      stage->function(stage->context, worker, round * stage->count + task - first);
      atomic_fetch_add_explicit(&queue->ended, 1, memory_order_acq_rel);
    }
  }
}

void sl_run_rounds(const sl_executor *executor, const sl_stage *stages, int count, int64_t rounds) {
  if (!executor) executor = sl_serial_executor();
  round_queue queue = {stages, count, 0, 0, 0, 0};
  int64_t workers = sl_executor_workers(executor), most = 0;
  for (int i = 0; i < count; ++i) {
    queue.round_tasks += stages[i].count;
    most = stages[i].count > most ? stages[i].count : most;
  }
  queue.tasks = queue.round_tasks * rounds;
  if (queue.tasks == 0) return;
  executor->parallel_for(executor->self, workers < most ? workers : most, drain_rounds, &queue);
}

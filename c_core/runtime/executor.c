/* The serial executor, and dynamic scheduling of tasks over any executor. */
#include "runtime/executor.h"

#include <stdatomic.h>
#include <stddef.h>

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

/* Runs numbered tasks over an executor; idle workers take the next task, so uneven tasks balance. */
#ifndef SL_RUNTIME_EXECUTOR_H
#define SL_RUNTIME_EXECUTOR_H

#include <sluice/executor.h>

/* worker is in [0, sl_executor_workers()): use it to pick scratch memory. Which worker gets which task depends on
 * timing, so a task's result must not depend on its worker. */
typedef void (*sl_task_function)(void *context, int64_t worker, int64_t task);

/* How many tasks may run at the same time; at least 1. NULL means serial. */
int64_t sl_executor_workers(const sl_executor *executor);

/* Runs function for every task in [0, count), handing out the lowest numbers first. */
void sl_run_tasks(const sl_executor *executor, int64_t count, sl_task_function function, void *context);

/* Tasks that may begin when all of the stage before have ended. */
typedef struct sl_stage {
  int64_t count; /* 0: the stage is left out, and after with it */
  sl_task_function function;
  void (*after)(void *context); /* called once, by the worker that ended the last task; or NULL */
  void *context;
} sl_stage;

enum { SL_MOST_STAGES = 4 };

/* Runs the stages one after the other in one parallel region, since starting a region costs as much as a small stage.
 * Workers that find no task left wait for those that still have one. */
void sl_run_stages(const sl_executor *executor, const sl_stage *stages, int count);

/* Runs count stages one after the other, and all of them again, rounds times in all, in one parallel region. Task t of
 * a stage in round r is its task number r * stage.count + t, so that the function knows both. There may be any number
 * of stages, without after. */
void sl_run_rounds(const sl_executor *executor, const sl_stage *stages, int count, int64_t rounds);

/* What a loop that waits for another thread does in its turn 0, 1, 2, ... */
void sl_wait_a_turn(int64_t turn);

#endif

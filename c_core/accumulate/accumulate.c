/* Public entry of accumulate: validate, choose the kernel of this machine, cut the blocks into tasks, add up what they
 * measured in an order that doesn't depend on who ran them. */
#include <sluice/accumulate.h>

#include <stddef.h>

#include "accumulate/kernel.h"
#include "accumulate/validate.h"
#include "runtime/arena.h"
#include "runtime/executor.h"
#include "runtime/status.h"

/* A task is so many blocks: 32 Ki elements, enough to make handing it out cheap, few enough to balance. */
enum { TASK_BLOCKS = 32 };

#define SL_ACCUMULATE_KERNEL(name) extern const sl_accumulate_kernel sl_accumulate_##name;
#include "accumulate/kernels.def"
#undef SL_ACCUMULATE_KERNEL

static const sl_accumulate_kernel *const kernels[] = {
#define SL_ACCUMULATE_KERNEL(name) &sl_accumulate_##name,
#include "accumulate/kernels.def"
#undef SL_ACCUMULATE_KERNEL
};
enum { KERNEL_COUNT = sizeof kernels / sizeof kernels[0] };

const sl_accumulate_kernel *sl_accumulate_list_kernels(int number) {
  return number >= 0 && number < KERNEL_COUNT ? kernels[number] : NULL;
}

static const sl_accumulate_kernel *find_kernel(void) {
  int i = 0;
  while (kernels[i]->isa > sl_cpu_isa()) ++i; /* ends: the last one is scalar */
  return kernels[i];
}

const char *sl_accumulate_kernel_name(void) { return find_kernel()->name; }

static int64_t count_tasks(int64_t count) { return (sl_count_blocks(count) + TASK_BLOCKS - 1) / TASK_BLOCKS; }

sl_status sl_accumulate_workspace_size(int64_t count, size_t *bytes) {
  SL_REQUIRE(bytes, SL_INVALID_ARGUMENT, "bytes is NULL");
  SL_CHECK(sl_accumulate_validate_count(count));
  sl_arena arena = sl_arena_make(NULL, 0);
  sl_arena_take(&arena, count_tasks(count), sizeof(sl_accumulate_stats));
  *bytes = arena.used;
  return SL_OK;
}

typedef struct run_context {
  const sl_accumulate_args *args;
  sl_accumulate_block function;
  sl_accumulate_stats *of_task; /* [tasks] */
} run_context;

static void add_stats(sl_accumulate_stats *sum, const sl_accumulate_stats *part) {
  sum->grad_sumsq += part->grad_sumsq;
  if (part->grad_amax > sum->grad_amax) sum->grad_amax = part->grad_amax;
  sum->grad_nonfinite += part->grad_nonfinite;
  sum->sum_sumsq += part->sum_sumsq;
  sum->error_sumsq += part->error_sumsq;
  sum->underflow += part->underflow;
}

static sl_accumulate_stats run_task(const sl_accumulate_args *args, sl_accumulate_block function, int64_t task) {
  int64_t blocks = sl_count_blocks(args->count), first = task * TASK_BLOCKS;
  int64_t end = first + TASK_BLOCKS < blocks ? first + TASK_BLOCKS : blocks;
  sl_accumulate_stats sum = {0};
  for (int64_t block = first; block < end; ++block) {
    sl_accumulate_stats part;
    function(args, block, &part);
    add_stats(&sum, &part);
  }
  return sum;
}

static void run_numbered_task(void *context, int64_t worker, int64_t task) {
  const run_context *run = context;
  (void)worker;
  run->of_task[task] = run_task(run->args, run->function, task);
}

static void run_serially(const sl_accumulate_args *args, sl_accumulate_block function) {
  sl_accumulate_stats sum = {0};
  for (int64_t task = 0; task < count_tasks(args->count); ++task) {
    sl_accumulate_stats part = run_task(args, function, task);
    add_stats(&sum, &part);
  }
  if (args->stats) *args->stats = sum;
}

static sl_status run(const sl_accumulate_args *args, sl_accumulate_block function) {
  int64_t tasks = count_tasks(args->count);
  sl_arena arena = sl_arena_make(args->workspace, args->workspace_size);
  run_context context = {args, function, sl_arena_take(&arena, tasks, sizeof(sl_accumulate_stats))};
  SL_REQUIRE(tasks == 0 || context.of_task, SL_OUT_OF_MEMORY, "workspace_size is %zu, expected at least %zu",
             args->workspace ? args->workspace_size : 0, arena.used);
  if (tasks <= 1 || sl_executor_workers(args->executor) == 1) {
    run_serially(args, function);
    return SL_OK;
  }
  sl_run_tasks(args->executor, tasks, run_numbered_task, &context);
  sl_accumulate_stats sum = {0};
  for (int64_t task = 0; task < tasks; ++task) add_stats(&sum, &context.of_task[task]);
  if (args->stats) *args->stats = sum;
  return SL_OK;
}

sl_status sl_accumulate(const sl_accumulate_args *args) {
  SL_CHECK(sl_accumulate_validate(args, SL_ACCUMULATE));
  return run(args, find_kernel()->accumulate);
}

sl_status sl_measure_gradient(const sl_accumulate_args *args) {
  SL_CHECK(sl_accumulate_validate(args, SL_MEASURE));
  return run(args, find_kernel()->measure);
}

sl_status sl_read_accumulator(const sl_accumulate_args *args) {
  SL_CHECK(sl_accumulate_validate(args, SL_READ));
  return run(args, find_kernel()->read);
}

sl_status sl_accumulate_reference(const sl_accumulate_args *args) {
  SL_CHECK(sl_accumulate_validate(args, SL_ACCUMULATE));
  run_serially(args, sl_accumulate_scalar.accumulate);
  return SL_OK;
}

sl_status sl_measure_gradient_reference(const sl_accumulate_args *args) {
  SL_CHECK(sl_accumulate_validate(args, SL_MEASURE));
  run_serially(args, sl_accumulate_scalar.measure);
  return SL_OK;
}

sl_status sl_read_accumulator_reference(const sl_accumulate_args *args) {
  SL_CHECK(sl_accumulate_validate(args, SL_READ));
  run_serially(args, sl_accumulate_scalar.read);
  return SL_OK;
}

/* Public entry of prune: validate, choose the kernel of this machine, bring the weight's dimensions into the order of
 * its memory, cut the channels into tasks. A channel belongs to one task, so threads change no bit. */
#include <sluice/prune.h>

#include <stdbool.h>
#include <stddef.h>

#include "prune/kernel.h"
#include "prune/validate.h"
#include "runtime/executor.h"
#include "runtime/status.h"

#define SL_PRUNE_KERNEL(name) extern const sl_prune_kernel sl_prune_##name;
#include "prune/kernels.def"
#undef SL_PRUNE_KERNEL

static const sl_prune_kernel *const kernels[] = {
#define SL_PRUNE_KERNEL(name) &sl_prune_##name,
#include "prune/kernels.def"
#undef SL_PRUNE_KERNEL
};
enum { KERNEL_COUNT = sizeof kernels / sizeof kernels[0] };

/* Channels whose sums are kept on the stack, and elements that make a task worth handing out. */
enum { MOST_CHANNELS = 256, TASK_ELEMENTS = 1 << 15 };

const sl_prune_kernel *sl_prune_list_kernels(int number) {
  return number >= 0 && number < KERNEL_COUNT ? kernels[number] : NULL;
}

static const sl_prune_kernel *find_kernel(void) {
  int i = 0;
  while (kernels[i]->isa > sl_cpu_isa()) ++i; /* ends: the last one is scalar */
  return kernels[i];
}

const char *sl_channel_norms_kernel_name(void) { return find_kernel()->name; }

/* A weight seen from its channels: each has the same set of runs, at outer offsets from its first element. */
typedef struct plan {
  const sl_channel_norms_args *args;
  const sl_prune_kernel *kernel;
  int64_t channels, channel_stride, task_channels;
  int64_t run_count, run_stride; /* of the elements in a run */
  int64_t runs;                  /* per channel */
  int outer;                     /* dimensions over the run's */
  int64_t sizes[SL_PRUNE_MAX_RANK], strides[SL_PRUNE_MAX_RANK];
  bool by_element; /* channels are neighbours in memory, the elements of a run are not */
  bool across;     /* a channel's next run lies behind the other channels' */
} plan;

/* Sorted by stride, merged where one dimension continues the other; sizes of 1 say nothing. */
static int order_dimensions(const sl_channel_norms_args *args, int64_t *sizes, int64_t *strides) {
  int count = 0;
  for (int64_t i = 0; i < args->rank; ++i) {
    if (i == args->dim || args->sizes[i] == 1) continue;
    int place = count++;
    for (; place > 0 && strides[place - 1] > args->strides[i]; --place) {
      sizes[place] = sizes[place - 1], strides[place] = strides[place - 1];
    }
    sizes[place] = args->sizes[i], strides[place] = args->strides[i];
  }
  int merged = 0;
  for (int i = 1; i < count; ++i) {
    if (strides[i] == strides[merged] * sizes[merged]) {
      sizes[merged] *= sizes[i];
    } else {
      ++merged;
      sizes[merged] = sizes[i], strides[merged] = strides[i];
    }
  }
  return count ? merged + 1 : 0;
}

static plan make_plan(const sl_channel_norms_args *args, const sl_prune_kernel *kernel) {
  plan p = {.args = args, .kernel = kernel, .run_count = 1, .run_stride = 1, .runs = 1};
  int64_t sizes[SL_PRUNE_MAX_RANK], strides[SL_PRUNE_MAX_RANK];
  p.channels = args->sizes[args->dim], p.channel_stride = args->strides[args->dim];
  int dimensions = order_dimensions(args, sizes, strides);
  if (dimensions) p.run_count = sizes[0], p.run_stride = strides[0];
  p.outer = dimensions ? dimensions - 1 : 0;
  for (int i = 0; i < p.outer; ++i) {
    p.sizes[i] = sizes[i + 1], p.strides[i] = strides[i + 1];
    p.runs *= p.sizes[i];
  }
  p.by_element = p.channel_stride == 1 && (!dimensions || p.run_stride != 1);
  int64_t elements = p.runs * p.run_count; /* of a channel; 0 if there is an empty dimension */
  int64_t enough = elements > 0 ? TASK_ELEMENTS / elements : MOST_CHANNELS;
  p.task_channels = enough < 1 ? 1 : enough > MOST_CHANNELS ? MOST_CHANNELS : enough;
  /* Rows of neighbours are read across channels: short pieces of them would each wait for memory anew. */
  p.across = p.outer > 0 && p.channel_stride < p.strides[0];
  if (p.by_element || p.across) p.task_channels = MOST_CHANNELS;
  return p;
}

/* Where run number `run` begins, from the first element of its channel. */
static int64_t run_offset(const plan *p, int64_t run) {
  int64_t offset = 0;
  for (int i = 0; i < p->outer; ++i) {
    offset += run % p->sizes[i] * p->strides[i];
    run /= p->sizes[i];
  }
  return offset;
}

static void store_norm(const plan *p, int64_t channel, double norm) {
  if (p->args->dtype == SL_F64)
    ((double *)p->args->norms)[channel] = norm;
  else
    ((float *)p->args->norms)[channel] = (float)norm;
}

static void add_by_element(const plan *p, int64_t first, int64_t count) {
  double sums[MOST_CHANNELS] = {0};
  for (int64_t run = 0; run < p->runs; ++run) {
    int64_t offset = first + run_offset(p, run);
    for (int64_t i = 0; i < p->run_count; ++i) {
      const void *row = sl_prune_offset(p->args->weight, offset + i * p->run_stride, p->args->dtype);
      p->kernel->add_to_each(p->args->dtype, row, count, sums);
    }
  }
  for (int64_t i = 0; i < count; ++i) store_norm(p, first + i, sums[i]);
}

static double add_one_run(const plan *p, int64_t offset) {
  sl_dtype dtype = p->args->dtype;
  const void *values = sl_prune_offset(p->args->weight, offset, dtype);
  return p->run_stride == 1 ? p->kernel->add_run(dtype, values, p->run_count)
                            : sl_prune_add_spaced(dtype, values, p->run_count, p->run_stride);
}

/* Runs of neighbouring channels are read one after the other where that is the order of memory. */
static void add_by_run(const plan *p, int64_t first, int64_t count) {
  double sums[MOST_CHANNELS] = {0};
  if (p->across) {
    for (int64_t run = 0; run < p->runs; ++run) {
      int64_t offset = first * p->channel_stride + run_offset(p, run);
      for (int64_t i = 0; i < count; ++i) sums[i] += add_one_run(p, offset + i * p->channel_stride);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t run = 0; run < p->runs; ++run) {
        sums[i] += add_one_run(p, (first + i) * p->channel_stride + run_offset(p, run));
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) store_norm(p, first + i, sums[i]);
}

static void run_task(void *context, int64_t worker, int64_t task) {
  const plan *p = context;
  int64_t first = task * p->task_channels, left = p->channels - first;
  int64_t count = left < p->task_channels ? left : p->task_channels;
  (void)worker;
  if (p->runs == 0 || p->run_count == 0) {
    for (int64_t i = 0; i < count; ++i) store_norm(p, first + i, 0);
  } else if (p->by_element) {
    add_by_element(p, first, count);
  } else {
    add_by_run(p, first, count);
  }
}

static sl_status run(const sl_channel_norms_args *args, const sl_prune_kernel *kernel, const sl_executor *executor) {
  plan p = make_plan(args, kernel);
  int64_t tasks = p.channels / p.task_channels + (p.channels % p.task_channels != 0);
  sl_run_tasks(executor, tasks, run_task, &p);
  return SL_OK;
}

sl_status sl_channel_norms(const sl_channel_norms_args *args) {
  SL_CHECK(sl_channel_norms_validate(args));
  return run(args, find_kernel(), args->executor);
}

sl_status sl_channel_norms_reference(const sl_channel_norms_args *args) {
  SL_CHECK(sl_channel_norms_validate(args));
  return run(args, &sl_prune_scalar, NULL);
}

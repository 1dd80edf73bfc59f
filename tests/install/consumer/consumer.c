/* A C program that uses an installed Sluice with no Python: the same attention on the serial executor, on an executor
 * of POSIX threads, and by the reference, which must agree. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sluice/sluice.h>

enum { THREADS = 3, BATCH = 1, HEADS = 3, TOKENS = 65, DIM = 16, ELEMENTS = BATCH * HEADS * TOKENS * DIM };

typedef struct range {
  sl_range_function function;
  void *context;
  int64_t begin, end;
} range;

static void *run_range(void *argument) {
  range *work = argument;
  if (work->begin < work->end) work->function(work->context, work->begin, work->end);
  return NULL;
}

static void parallel_for(void *self, int64_t count, sl_range_function function, void *context) {
  (void)self;
  pthread_t threads[THREADS];
  range work[THREADS];
  for (int64_t i = 0; i < THREADS; ++i) {
    work[i] = (range){function, context, count * i / THREADS, count * (i + 1) / THREADS};
    if (pthread_create(&threads[i], NULL, run_range, &work[i]) != 0) exit(2);
  }
  for (int i = 0; i < THREADS; ++i) pthread_join(threads[i], NULL);
}

static sl_status attend(const float *data, const float *gates, const sl_executor *executor, float *out) {
  sl_tensor4 layout = {NULL, HEADS * TOKENS * DIM, TOKENS * DIM, DIM};
  sl_tensor3 gate_layout = {NULL, HEADS * TOKENS, TOKENS};
  float logit_tau[BATCH * HEADS];
  for (int i = 0; i < BATCH * HEADS; ++i) logit_tau[i] = 0.1f;
  sl_gated_attention_args args = {0};
  args.dtype = SL_F32;
  args.batch = BATCH, args.heads_q = args.heads_kv = HEADS, args.n_q = args.n_k = TOKENS;
  args.head_dim = args.head_dim_v = DIM;
  args.q = args.k = args.v = args.out = layout;
  args.q.data = (void *)data, args.k.data = (void *)(data + ELEMENTS), args.v.data = (void *)(data + 2 * ELEMENTS);
  args.a = args.b = gate_layout;
  args.a.data = (void *)gates, args.b.data = (void *)(gates + BATCH * HEADS * TOKENS);
  args.logit_tau = logit_tau, args.causal = true, args.window = 4, args.sinks = 1, args.scale = 0.25;
  args.out.data = out, args.executor = executor;
  if (!executor) return sl_gated_attention_reference(&args);

  sl_status status = sl_gated_attention_workspace_size(&args, &args.workspace_size);
  if (status != SL_OK) return status;
  args.workspace = aligned_alloc(64, (args.workspace_size + 64) / 64 * 64);
  status = args.workspace ? sl_gated_attention(&args) : SL_OUT_OF_MEMORY;
  free(args.workspace);
  return status;
}

int main(void) {
  static float data[3 * ELEMENTS], gates[2 * BATCH * HEADS * TOKENS];
  static float reference[ELEMENTS], serial[ELEMENTS], threaded[ELEMENTS];
  for (int i = 0; i < 3 * ELEMENTS; ++i) data[i] = sinf((float)(i * 7 % 1009));
  for (int i = 0; i < 2 * BATCH * HEADS * TOKENS; ++i) gates[i] = 2 * cosf((float)(i * 5 % 307));

  if (strcmp(sl_version(), SL_VERSION_STRING) != 0) {
    fprintf(stderr, "library %s, header %s\n", sl_version(), SL_VERSION_STRING);
    return 1;
  }
  sl_executor posix_threads = {parallel_for, NULL, THREADS};
  if (attend(data, gates, NULL, reference) != SL_OK || attend(data, gates, sl_serial_executor(), serial) != SL_OK ||
      attend(data, gates, &posix_threads, threaded) != SL_OK) {
    fprintf(stderr, "%s\n", sl_last_error());
    return 1;
  }
  float largest = 0;
  for (int i = 0; i < ELEMENTS; ++i) largest = fmaxf(largest, fabsf(serial[i] - reference[i]));
  printf("%s on %s: largest difference from the reference %g\n", sl_gated_attention_kernel_name(SL_F32),
         sl_isa_name(sl_cpu_isa()), largest);
  if (!(largest < 1e-5f)) return 1;
  if (memcmp(serial, threaded, sizeof serial) != 0) {
    fprintf(stderr, "the serial and the threaded result differ\n");
    return 1;
  }
  return 0;
}

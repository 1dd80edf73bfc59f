/* schedule: the order of work on the ranks of a pipeline, and how long a training step takes in that order.
 *
 * A model is cut into ranks * stages_per_rank stages, counted from 0 in the order of the forward. A stage computes for
 * each micro-batch a forward (F) and a backward; the backward is one piece (B), or is split into the gradient of the
 * stage's input (I), which the stage before waits for, and that of its weights (W), which nobody waits for.
 *
 * SCHEDULES, p = ranks, v = stages_per_rank, m = micro_batches, r = the rank. A row says in which phases rank r works;
 * n x {..} repeats what is in braces n times, and every kind of work takes micro-batches in their order.
 *   GPIPE        v = 1. m x {F}, m x {B}. Huang et al., "GPipe", arXiv 1811.06965. (Its picture runs the backwards in
 *                the reverse order, torch's ScheduleGPipe in this one: time and memory are the same.)
 *   1F1B         v = 1. w x {F}, (m - w) x {F B}, w x {B}, w = min(m, p - 1 - r). PipeDream-Flush: Narayanan et al.,
 *                arXiv 2006.09503, and arXiv 2104.04473, section 2.2.1.
 *   INTERLEAVED  v >= 2; stage s is on rank s % p. As 1F1B on m v steps with w = min(m v, (v - 1) g + 2 (p - 1 - r)).
 *                Step n of the forward takes stage p (n / g % v) + r and micro-batch n / (g v) g + n % g; the backward
 *                takes the stages from the last. Narayanan et al., arXiv 2104.04473, section 2.2.2, with g = p. Where p
 *                does not divide m, as in torch's ScheduleInterleaved1F1B: g = m / max(1, m / p), which must divide m.
 *   ZB_H1        Any v. w = min(m v, (v - 1) g + p - 1 - r), and W lags I by r steps: w x {F}, then {F I}, then
 *                {F I W}, then {I}, {I W}, {W}. Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241,
 *                section 2.3 (v = 1); v > 1 is torch's ScheduleInterleavedZeroBubble, stages and g as in INTERLEAVED.
 *   ZBV          v = 2; rank r has the stages r (0 below) and 2 p - 1 - r (1 below). The phases are those of
 *                n = max(m, 2 p - 1) micro-batches, of which those from m on are left out: (2 (p - r) - 1) x {F0},
 *                r x {F1 F0}, (p - r) x {F1 I1 W1}, (n - 2 p + r + 1) x {F0 I0 W0 F1 I1 W1},
 *                (p - r - 1) x {I0 W0 F1 I1 W1}, r x {I0 I1}, (p - r) x {I0 W0}, r x {W1}, r x {W0}.
 *                Qi et al., section 6, as torch's ScheduleZBVZeroBubble has it.
 *
 * TIME. A rank does its work in the order of the schedule, one piece after the other, as soon as what the piece needs
 * is there. A forward needs the output of the stage before, a backward (B or I) the gradient from the stage behind. A
 * result that goes to another rank is a message: it sets out when it is computed and the messages of this rank that
 * were sent before it have left the link; it occupies the link for bytes / bytes_per_s, and arrives latency_s after it
 * has left. Between stages of one rank there is no message. When the last weight gradient of a stage is there, its
 * data-parallel reduction is queued on the rank's reduce link. Links belong to the rank that sends.
 *
 * CONTENTION. With shared_port, a rank's messages in both directions and its reductions go through one port. Messages
 * that are sent before the rank's first reduction is queued keep their speed, and that reduction waits for them; those
 * sent after it get (1 - reduce_share) of their link's speed. Reductions get what messages leave of the port's time:
 * all of it while none is under way, reduce_share of it else. Which message is slowed thus depends on the order of work
 * and not on times, so that a faster link or rank never makes a step slower, as it could with shares by chance.
 *
 * ERRORS  SL_INVALID_ARGUMENT, SL_OUT_OF_RANGE, SL_OUT_OF_MEMORY (workspace or events are too small).
 * DETERMINISM  the same arguments give the same bits. Nothing is allocated and nothing is kept between calls.
 */
#ifndef SLUICE_SCHEDULE_H
#define SLUICE_SCHEDULE_H

#include <sluice/types.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum sl_schedule_kind {
  SL_SCHEDULE_GPIPE = 0,
  SL_SCHEDULE_1F1B = 1,
  SL_SCHEDULE_INTERLEAVED = 2,
  SL_SCHEDULE_ZB_H1 = 3,
  SL_SCHEDULE_ZBV = 4,
} sl_schedule_kind;

typedef struct sl_schedule {
  int64_t kind;            /* an sl_schedule_kind */
  int64_t ranks;           /* 1 to 2^16 */
  int64_t stages_per_rank; /* 1 to 2^10, as the schedule allows */
  int64_t micro_batches;   /* 1 to 2^20; with the stages at most 2^31 pieces of each kind of work */
} sl_schedule;

typedef enum sl_work_kind {
  SL_WORK_FORWARD = 0,
  SL_WORK_BACKWARD = 1,        /* of input and weights in one piece */
  SL_WORK_BACKWARD_INPUT = 2,  /* I */
  SL_WORK_BACKWARD_WEIGHT = 3, /* W */
  /* In events only: */
  SL_WORK_SEND_FORWARD = 4,  /* an output on its way, from setting out to arriving */
  SL_WORK_SEND_BACKWARD = 5, /* a gradient on its way */
  SL_WORK_REDUCE = 6,        /* a stage's gradients over the data-parallel ranks, from its first byte to its end */
} sl_work_kind;

typedef struct sl_work {
  int32_t kind;        /* an sl_work_kind */
  int32_t rank;        /* that does it, or sends */
  int32_t stage;       /* whose work it is, or that sends */
  int32_t micro_batch; /* -1 for a reduction */
} sl_work;

/* Pieces of work on each rank: 2 or 3 (the backward is split) for each stage and micro-batch. */
SL_API sl_status sl_schedule_work_count(const sl_schedule *schedule, int64_t *count);

/* Writes the order of one rank: sl_schedule_work_count() pieces. */
SL_API sl_status sl_schedule_order(const sl_schedule *schedule, int64_t rank, sl_work *order);

/* The rank that a stage is on. */
SL_API sl_status sl_schedule_stage_rank(const sl_schedule *schedule, int64_t stage, int64_t *rank);

/* "gpipe", "1f1b", "interleaved", "zb-h1", "zbv"; NULL for a value outside the enum. */
SL_API const char *sl_schedule_name(int64_t kind);

/* "forward", "backward", "backward input", "backward weight", "send forward", "send backward", "reduce"; else NULL. */
SL_API const char *sl_work_name(int64_t kind);

/* What carries messages from one rank to another. */
typedef struct sl_link {
  double latency_s;   /* 0 to 1e6 */
  double bytes_per_s; /* at least 1; infinity is allowed */
} sl_link;

/* Arrays have an element for each stage or each rank, by their numbers. Times are 0 to 1e9 s, bytes 0 to 1e18. */
typedef struct sl_simulate_args {
  size_t size; /* sizeof(sl_simulate_args) */
  sl_schedule schedule;
  const double *forward_s;         /* [stages] time of a micro-batch's forward */
  const double *backward_input_s;  /* [stages] of its backward to the input */
  const double *backward_weight_s; /* [stages] to the weights; B takes the sum of both */
  const double *slowdowns;         /* [ranks] factor of all times on a rank, 1e-6 to 1e6; NULL: 1 */
  const double *forward_bytes;     /* [stages] of the output that a stage sends on; NULL: 0 */
  const double *backward_bytes;    /* [stages] of the gradient that a stage sends back; NULL: 0 */
  const double *reduce_bytes;      /* [stages] of a stage's reduction, as the reduce link carries it; NULL: none */
  const sl_link *next_links;       /* [ranks] from rank r to (r + 1) % ranks; NULL: no time */
  const sl_link *
      previous_links; /* [ranks] from rank r to (r - 1) % ranks; with 2 ranks next_links is used; NULL: as next_links */
  const sl_link *reduce_links;    /* [ranks] NULL: as next_links */
  int64_t shared_port;            /* 0, or 1: see CONTENTION */
  double reduce_share;            /* 0 to 0.99 of the port's time; with shared_port only */
  int64_t blocking_sends;         /* 0, or 1: a rank waits until what it sends has left the link */
  const double *activation_bytes; /* [stages] kept for a micro-batch from F's begin to B's or I's end; NULL: 0 */
  const double *weight_bytes;     /* [stages] kept from I's end to W's end; NULL: as activation_bytes */
  void *workspace;                /* sl_simulate_sizes() bytes, aligned to 8 bytes; contents don't matter */
  size_t workspace_size;
  struct sl_event *events; /* NULL, or room for all of them */
  int64_t event_capacity;
  struct sl_rank_times *ranks; /* [ranks] written; NULL: not wanted */
} sl_simulate_args;

typedef struct sl_event {
  sl_work work;
  double begin_s, end_s;
} sl_event;

/* Of one rank. Work in the sense of computing: messages and reductions are not work. */
typedef struct sl_rank_times {
  double busy_s;            /* sum of its work */
  double idle_s;            /* compute_s of the step - busy_s */
  double wait_s;            /* of idle_s, what lies between its first and its last piece of work */
  double begin_s, end_s;    /* of its first and its last piece of work */
  double peak_bytes;        /* largest sum of activation_bytes and weight_bytes that it keeps at once */
  int64_t peak_activations; /* largest number of (stage, micro-batch) between F's begin and B's or W's end */
} sl_rank_times;

typedef struct sl_simulate_result {
  size_t size;         /* set by the caller: sizeof(sl_simulate_result) */
  double makespan_s;   /* until all work and all reductions are done */
  double compute_s;    /* until all work is done */
  double bubble_share; /* idle_s of all ranks / (ranks * compute_s); 0 if nothing takes time */
  double bubble_ratio; /* idle_s of all ranks / busy_s of all ranks: (p - 1) / m for 1F1B with even stages */
  int64_t event_count; /* work, messages and reductions that were processed, whether or not they were asked for */
} sl_simulate_result;

/* Bytes of workspace, and the number of events. Reads schedule and reduce_bytes (NULL or not) of the arguments. */
SL_API sl_status sl_simulate_sizes(const sl_simulate_args *args, size_t *workspace_size, int64_t *event_count);

/* Events are written rank by rank as they are worked out: in the order of time for each rank and kind, not over all. */
SL_API sl_status sl_simulate(const sl_simulate_args *args, sl_simulate_result *result);

#ifdef __cplusplus
}
#endif
#endif

/* The search: nested loops over divisors, which skip only what two bounds prove to be no better.
 *
 * BOUND OF MEMORY  weight_bytes + gradient_bytes + state_bytes depend on tp, cp, pp, dp and zero alone and shrink as
 *   zero grows; the other parts of total_bytes are never negative. So where they exceed memory_bytes at the highest
 *   zero, every layout of that cut does, and none of them is looked at, but for the one that `smallest` needs.
 * BOUND OF TIME  compute_s + tp_s + cp_s of a cut and a micro-batch without recomputation: neither vpp nor zero enters
 *   them, recomputation only adds to them, and the other parts of step_s are never negative. So where they are no less
 *   than the slowest candidate that is kept, with no room for more, no layout of that cut and micro-batch is faster.
 *   Equal times lose to the candidate that came before, as the contract says.
 */
#include <math.h>
#include <sluice/plan_search.h>
#include <string.h>

#include "plan/validate.h"
#include "runtime/status.h"

typedef struct search {
  const sl_plan_model *model;
  const sl_plan_cluster *cluster;
  const sl_plan_space *space;
  sl_plan_candidate *candidates;
  int64_t capacity;
  sl_plan_found *found;
  sl_plan_layout layout; /* that is being looked at */
  int32_t wants_sequence_parallel;
  sl_plan_schedule flat; /* of vpp = 1 */
} search;

static int64_t highest(sl_plan_range range, int64_t limit) { return range.most < limit ? range.most : limit; }

static void note_smallest(search *s, const sl_plan_candidate *candidate) {
  sl_plan_candidate *smallest = &s->found->smallest;
  if (smallest->estimate.size == 0 || candidate->estimate.total_bytes < smallest->estimate.total_bytes)
    *smallest = *candidate;
}

/* Puts a candidate that fits into the sorted list, behind those that are as fast. */
static void keep(search *s, const sl_plan_candidate *candidate) {
  int64_t place = s->found->count;
  while (place > 0 && s->candidates[place - 1].estimate.step_s > candidate->estimate.step_s) --place;
  if (place >= s->capacity) return;
  int64_t behind = s->found->count - place;
  if (s->found->count == s->capacity)
    --behind;
  else
    ++s->found->count;
  memmove(s->candidates + place + 1, s->candidates + place, (size_t)behind * sizeof *candidate);
  s->candidates[place] = *candidate;
}

static void look_at(search *s) {
  sl_plan_candidate candidate = {.layout = s->layout, .estimate = {.size = sizeof candidate.estimate}};
  if (sl_plan_predict(s->model, s->cluster, &s->layout, &candidate.estimate) != SL_OK) return;
  ++s->found->predicted;
  note_smallest(s, &candidate);
  if (candidate.estimate.total_bytes <= s->cluster->memory_bytes) keep(s, &candidate);
}

static void set_vpp(search *s, int64_t vpp) {
  s->layout.vpp = vpp;
  s->layout.schedule = vpp > 1 ? SL_PLAN_INTERLEAVED : s->flat;
}

/* Everything below a cut and a micro-batch. */
static void look_inside(search *s) {
  const sl_plan_space *space = s->space;
  int64_t chunks = s->layout.pp > 1 ? s->model->layers / s->layout.pp : 1;
  for (int64_t vpp = space->vpp.least; vpp <= highest(space->vpp, chunks); ++vpp) {
    if (chunks % vpp) continue;
    set_vpp(s, vpp);
    for (int64_t recompute = space->recompute.least; recompute <= space->recompute.most; ++recompute)
      for (int64_t zero = space->zero.least; zero <= space->zero.most; ++zero) {
        s->layout.recompute = (sl_plan_recompute)recompute, s->layout.zero = (int32_t)zero;
        look_at(s);
      }
  }
}

/* Whether no layout of this cut and micro-batch can enter the list; notes the leanest of them in that case. */
static int is_hopeless(search *s) {
  sl_plan_candidate bound = {.estimate = {.size = sizeof bound.estimate}};
  s->layout.recompute = SL_PLAN_KEEP, s->layout.zero = (int32_t)s->space->zero.most;
  set_vpp(s, s->space->vpp.least);
  /* A vpp that isn't a divisor has no layouts to lose: look_inside() goes over the ones that are. */
  if (sl_plan_predict(s->model, s->cluster, &s->layout, &bound.estimate) != SL_OK) return 0;
  const sl_plan_estimate *e = &bound.estimate;
  int too_large = e->weight_bytes + e->gradient_bytes + e->state_bytes > s->cluster->memory_bytes;
  int too_slow = s->found->count == s->capacity && s->capacity > 0 &&
                 e->compute_s + e->tp_s + e->cp_s >= s->candidates[s->capacity - 1].estimate.step_s;
  if (!too_large && !too_slow) return 0;
  s->layout.recompute = (sl_plan_recompute)s->space->recompute.most;
  bound.layout = s->layout;
  if (sl_plan_predict(s->model, s->cluster, &s->layout, &bound.estimate) == SL_OK) note_smallest(s, &bound);
  return 1;
}

static void look_at_cut(search *s) {
  sl_plan_layout *layout = &s->layout;
  int64_t tokens = layout->tp * layout->cp;
  layout->sequence_parallel = s->wants_sequence_parallel && layout->tp > 1 && s->model->sequence % tokens == 0;
  if (layout->global_batch % layout->dp) return;
  int64_t share = layout->global_batch / layout->dp;
  int64_t most = highest(s->space->micro_batch, share);
  for (int64_t micro = s->space->micro_batch.least; micro <= most; ++micro) {
    if (share % micro) continue;
    layout->micro_batch = micro, layout->vpp = 1, layout->schedule = s->flat;
    layout->recompute = SL_PLAN_KEEP, layout->zero = (int32_t)s->space->zero.least;
    if (sl_plan_check(s->model, s->cluster, layout) != SL_OK) continue;
    ++s->found->cuttable;
    if (!is_hopeless(s)) look_inside(s);
  }
}

static void look_at_cuts(search *s) {
  const sl_plan_space *space = s->space;
  int64_t gpus = s->layout.gpus;
  for (int64_t tp = space->tp.least; tp <= highest(space->tp, gpus); ++tp) {
    if (gpus % tp || s->model->heads % tp) continue;
    int64_t others = gpus / tp;
    for (int64_t cp = space->cp.least; cp <= highest(space->cp, others); ++cp) {
      if (others % cp || s->model->sequence % cp) continue;
      int64_t rest = others / cp;
      for (int64_t pp = space->pp.least; pp <= highest(space->pp, rest < s->model->layers ? rest : s->model->layers);
           ++pp) {
        if (rest % pp || s->model->layers % pp) continue;
        s->layout.tp = tp, s->layout.cp = cp, s->layout.pp = pp, s->layout.dp = rest / pp;
        if (s->layout.dp >= space->dp.least && s->layout.dp <= space->dp.most) look_at_cut(s);
      }
    }
  }
}

static sl_status check_range(const char *name, sl_plan_range range, int64_t least, int64_t most) {
  SL_REQUIRE(range.least >= least && range.most <= most && range.least <= range.most, SL_INVALID_ARGUMENT,
             "space.%s is %lld to %lld, expected a range within %lld to %lld", name, (long long)range.least,
             (long long)range.most, (long long)least, (long long)most);
  return SL_OK;
}

static sl_status check_space(const sl_plan_space *space) {
  SL_REQUIRE(space, SL_INVALID_ARGUMENT, "space is NULL, expected an sl_plan_space");
  SL_REQUIRE(space->size == sizeof *space, SL_INVALID_ARGUMENT,
             "space.size is %zu, expected sizeof(sl_plan_space) = %zu", space->size, sizeof *space);
  int64_t most = INT64_C(1) << 40;
  SL_CHECK(check_range("dp", space->dp, 1, most));
  SL_CHECK(check_range("tp", space->tp, 1, most));
  SL_CHECK(check_range("pp", space->pp, 1, most));
  SL_CHECK(check_range("cp", space->cp, 1, most));
  SL_CHECK(check_range("vpp", space->vpp, 1, most));
  SL_CHECK(check_range("micro_batch", space->micro_batch, 1, 4096));
  SL_CHECK(check_range("recompute", space->recompute, SL_PLAN_KEEP, SL_PLAN_FULL));
  return check_range("zero", space->zero, 0, 3);
}

/* What holds for every layout of the space, checked on the one that is cut least: the message is then the caller's. */
static sl_status check_base(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout) {
  SL_REQUIRE(layout, SL_INVALID_ARGUMENT, "layout is NULL, expected an sl_plan_layout");
  sl_plan_layout base = *layout;
  SL_REQUIRE(base.gpus >= 1 && base.gpus <= 1 << 20, SL_INVALID_ARGUMENT, "layout->gpus is %lld, expected 1 to 2^20",
             (long long)base.gpus);
  base.gpus = base.dp = base.tp = base.pp = base.cp = base.vpp = base.micro_batch = 1;
  base.schedule = layout->schedule == SL_PLAN_INTERLEAVED ? SL_PLAN_1F1B : layout->schedule;
  return sl_plan_validate(model, cluster, &base);
}

sl_status sl_plan_search(const sl_plan_model *model, const sl_plan_cluster *cluster, const sl_plan_layout *layout,
                         const sl_plan_space *space, sl_plan_candidate *candidates, int64_t capacity,
                         sl_plan_found *found) {
  SL_CHECK(check_base(model, cluster, layout));
  SL_CHECK(check_space(space));
  SL_REQUIRE(capacity >= 0 && (candidates || capacity == 0), SL_INVALID_ARGUMENT,
             "capacity is %lld, expected at least 0, and candidates that have room for it", (long long)capacity);
  SL_REQUIRE(found, SL_INVALID_ARGUMENT, "found is NULL, expected an sl_plan_found");
  SL_REQUIRE(found->size == sizeof *found, SL_INVALID_ARGUMENT,
             "found.size is %zu, expected sizeof(sl_plan_found) = %zu", found->size, sizeof *found);
  *found = (sl_plan_found){.size = sizeof *found};
  search s = {model,
              cluster,
              space,
              candidates,
              capacity,
              found,
              *layout,
              layout->sequence_parallel,
              layout->schedule == SL_PLAN_GPIPE ? SL_PLAN_GPIPE : SL_PLAN_1F1B};
  look_at_cuts(&s);
  SL_REQUIRE(
      found->smallest.estimate.size, SL_INVALID_ARGUMENT,
      "layout->gpus is %lld, expected a number that some dp, tp, pp and cp of the space cut for %lld heads, %lld "
      "layers and global_batch = %lld",
      (long long)layout->gpus, (long long)model->heads, (long long)model->layers, (long long)layout->global_batch);
  return SL_OK;
}

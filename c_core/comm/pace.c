/* Two running means of the time for a byte, one for each way into a slot, and trials of the way that is behind. */
#include "comm/pace.h"

enum {
  TRIAL = 4,  /* steps made the other way at a time */
  PERIOD = 16 /* a trial among so many runs of that length: where it loses, it costs a few percent */
};

/* Quick to believe a shorter time, slow to believe a longer one, which may be another process's fault. */
static void record(float *cost, float measured) {
  *cost += (measured - *cost) * (*cost == 0 ? 1 : measured < *cost ? 0.5f : 0.125f);
}

void sl_pace_step(sl_pace *pace, unsigned kind, uint32_t step, int64_t now) {
  float *cost = pace->cost[kind];
  /* The first step after a change finds the slots' lines where the other way has left them. */
  if (now && pace->began && pace->bytes && pace->run > 0)
    record(cost + pace->streaming, (float)(now - pace->began) / (float)pace->bytes);
  bool better = cost[1] <= cost[0], trial = step / TRIAL % PERIOD == 0;
  bool streaming = trial ? !better : better;
  pace->run = streaming == pace->streaming ? pace->run + 1 : 0;
  pace->streaming = streaming;
  pace->began = now;
  pace->bytes = 0;
}

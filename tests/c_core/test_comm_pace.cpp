/* The choice between the ways into a slot, on a clock that the test moves. */
#include <gtest/gtest.h>

extern "C" {
#include "comm/pace.h"
}

namespace {

enum { PIECE = 1 << 20 };

/* Steps that cost so much a byte each way; they go on counting from one call to the next. */
struct Ranks {
  sl_pace pace{};
  uint32_t step = 0;
  double cost[2] = {0.1, 0.1}; /* ns a byte: through the caches, past them */

  /* One call; how many of its steps went past the caches. */
  int call(unsigned kind, int steps, size_t bytes = PIECE) {
    int64_t now = 1000;
    int streaming = 0;
    for (int i = 0; i < steps; ++i) {
      sl_pace_step(&pace, kind, ++step, i ? now : 0);
      pace.bytes += bytes;
      streaming += pace.streaming;
      now += static_cast<int64_t>(cost[pace.streaming] * static_cast<double>(bytes)) + 1;
    }
    return streaming;
  }
};

TEST(Pace, KeepsToTheFasterWayAndTriesTheOther) {
  for (int faster : {0, 1}) {
    Ranks ranks;
    ranks.cost[faster] = 0.05;
    ranks.call(3, 256);
    int streaming = ranks.call(3, 1024);
    int other = faster ? 1024 - streaming : streaming;
    EXPECT_EQ(other, 1024 / 16) << "the faster way is " << faster;
  }
}

TEST(Pace, FollowsAChange) {
  Ranks ranks;
  ranks.cost[0] = 0.05;
  ranks.call(3, 256);
  ranks.cost[0] = 0.4;
  ranks.call(3, 64);
  EXPECT_GT(ranks.call(3, 256), 200);
  ranks.cost[0] = 0.05;
  ranks.call(3, 64);
  EXPECT_LT(ranks.call(3, 256), 56);
}

TEST(Pace, OneSlowStepChangesNothing) {
  Ranks ranks;
  ranks.cost[0] = 0.05;
  ranks.call(3, 256);
  float before = ranks.pace.cost[3][0];
  ranks.cost[0] = 0.1;
  ranks.call(3, 3); /* of which one counts: a call's first step isn't timed */
  ranks.cost[0] = 0.05;
  EXPECT_LT(ranks.pace.cost[3][0], 1.3f * before);
  EXPECT_LT(ranks.call(3, 256), 56);
}

TEST(Pace, LearnsForEachKindOfCall) {
  Ranks ranks;
  ranks.cost[0] = 0.05;
  ranks.call(3, 256);
  ranks.cost[0] = 0.4;
  ranks.call(6, 256);
  EXPECT_LT(ranks.pace.cost[3][0], ranks.pace.cost[3][1]);
  EXPECT_GT(ranks.pace.cost[6][0], ranks.pace.cost[6][1]);
}

TEST(Pace, LearnsNothingFromCallsOfOneStepOrWithoutBytes) {
  Ranks ranks;
  for (int i = 0; i < 100; ++i) ranks.call(3, 1);
  ranks.call(3, 100, 0);
  EXPECT_EQ(ranks.pace.cost[3][0], 0);
  EXPECT_EQ(ranks.pace.cost[3][1], 0);
}

}  // namespace

// Orders of work: every piece once and after what it needs on its rank, the examples of the papers, bad input.
#include <set>
#include <sstream>

#include "schedule_problem.h"

namespace sluice_test {
namespace {

std::string text(const sl_schedule &schedule, int64_t rank) {
  static const char letters[] = {'F', 'B', 'I', 'W'};
  std::ostringstream out;
  for (const sl_work &work : order_of(schedule, rank)) {
    out << (out.tellp() > 0 ? " " : "") << letters[work.kind] << work.micro_batch;
    if (schedule.stages_per_rank > 1) out << "/" << work.stage;
  }
  return out.str();
}

std::string describe(const sl_schedule &schedule) {
  std::ostringstream out;
  out << sl_schedule_name(schedule.kind) << " " << schedule.ranks << " " << schedule.stages_per_rank << " "
      << schedule.micro_batches;
  return out.str();
}

TEST(Schedule, IsThatOfThePapers) {
  EXPECT_EQ(text({SL_SCHEDULE_GPIPE, 2, 1, 3}, 1), "F0 F1 F2 B0 B1 B2");
  EXPECT_EQ(text({SL_SCHEDULE_1F1B, 4, 1, 5}, 0), "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4");
  EXPECT_EQ(text({SL_SCHEDULE_1F1B, 4, 1, 5}, 3), "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4");
  EXPECT_EQ(text({SL_SCHEDULE_1F1B, 4, 1, 2}, 0), "F0 F1 B0 B1");
  EXPECT_EQ(text({SL_SCHEDULE_INTERLEAVED, 2, 2, 4}, 1),
            "F0/1 F1/1 F0/3 B0/3 F1/3 B1/3 F2/1 B0/1 F3/1 B1/1 F2/3 B2/3 F3/3 B3/3 B2/1 B3/1");
  EXPECT_EQ(text({SL_SCHEDULE_ZB_H1, 3, 1, 4}, 0), "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3");
  EXPECT_EQ(text({SL_SCHEDULE_ZB_H1, 3, 1, 4}, 2), "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3");
  EXPECT_EQ(text({SL_SCHEDULE_ZBV, 2, 2, 3}, 0),
            "F0/0 F1/0 F2/0 F0/3 I0/3 W0/3 F1/3 I1/3 W1/3 I0/0 W0/0 F2/3 I2/3 W2/3 I1/0 W1/0 I2/0 W2/0");
  EXPECT_EQ(text({SL_SCHEDULE_ZBV, 2, 2, 3}, 1),
            "F0/1 F0/2 F1/1 F1/2 I0/2 W0/2 F2/1 I0/1 W0/1 F2/2 I1/2 W1/2 I1/1 I2/2 I2/1 W1/1 W2/2 W2/1");
}

TEST(Schedule, DoesEveryPieceOnceAndInOrder) {
  for_each_schedule(6, 3, 14, [](const sl_schedule &schedule) {
    SCOPED_TRACE(describe(schedule));
    std::set<Piece> done;
    for (int64_t rank = 0; rank < schedule.ranks; ++rank) {
      for (const sl_work &work : order_of(schedule, rank)) {
        ASSERT_EQ(work.rank, rank);
        ASSERT_EQ(rank_of(schedule, work.stage), rank);
        ASSERT_TRUE(done.insert(piece(work)).second);
        int32_t before = work.kind == SL_WORK_BACKWARD_WEIGHT ? SL_WORK_BACKWARD_INPUT : SL_WORK_FORWARD;
        if (work.kind != SL_WORK_FORWARD) {
          ASSERT_TRUE(done.count({before, work.stage, work.micro_batch}));
        }
        if (work.micro_batch > 0) {
          ASSERT_TRUE(done.count({work.kind, work.stage, work.micro_batch - 1}));
        }
      }
    }
    int64_t kinds = backward_kind(schedule) == SL_WORK_BACKWARD ? 2 : 3;
    ASSERT_EQ(static_cast<int64_t>(done.size()),
              kinds * schedule.ranks * schedule.stages_per_rank * schedule.micro_batches);
  });
}

TEST(Schedule, PutsStagesOnRanks) {
  auto ranks = [](sl_schedule schedule) {
    std::vector<int64_t> all;
    for (int64_t stage = 0; stage < schedule.ranks * schedule.stages_per_rank; ++stage)
      all.push_back(rank_of(schedule, stage));
    return all;
  };
  EXPECT_EQ(ranks({SL_SCHEDULE_INTERLEAVED, 3, 2, 3}), (std::vector<int64_t>{0, 1, 2, 0, 1, 2}));
  EXPECT_EQ(ranks({SL_SCHEDULE_ZBV, 3, 2, 3}), (std::vector<int64_t>{0, 1, 2, 2, 1, 0}));
}

TEST(Schedule, HasNames) {
  EXPECT_STREQ(sl_schedule_name(SL_SCHEDULE_1F1B), "1f1b");
  EXPECT_STREQ(sl_schedule_name(SL_SCHEDULE_ZBV), "zbv");
  EXPECT_EQ(sl_schedule_name(5), nullptr);
  EXPECT_EQ(sl_schedule_name(-1), nullptr);
  EXPECT_STREQ(sl_work_name(SL_WORK_FORWARD), "forward");
  EXPECT_STREQ(sl_work_name(SL_WORK_REDUCE), "reduce");
  EXPECT_EQ(sl_work_name(7), nullptr);
}

TEST(Schedule, RefusesBadInputWithItsValue) {
  auto message = [](sl_schedule schedule) -> std::string {
    int64_t count = 0;
    EXPECT_NE(sl_schedule_work_count(&schedule, &count), SL_OK);
    return sl_last_error();
  };
  EXPECT_EQ(message({9, 2, 1, 4}), "kind is 9, expected 0 (gpipe), 1 (1f1b), 2 (interleaved), 3 (zb-h1) or 4 (zbv)");
  EXPECT_EQ(message({SL_SCHEDULE_1F1B, 0, 1, 4}), "ranks is 0, expected 1 to 65536");
  EXPECT_EQ(message({SL_SCHEDULE_1F1B, -3, 1, 4}), "ranks is -3, expected 1 to 65536");
  EXPECT_EQ(message({SL_SCHEDULE_1F1B, 2, 1, 0}), "micro_batches is 0, expected 1 to 1048576");
  EXPECT_EQ(message({SL_SCHEDULE_1F1B, 2, 0, 4}), "stages_per_rank is 0, expected 1 to 1024");
  EXPECT_EQ(message({SL_SCHEDULE_1F1B, 2, 2, 4}), "stages_per_rank is 2, expected 1 with the schedule 1f1b");
  EXPECT_EQ(message({SL_SCHEDULE_GPIPE, 2, 3, 4}), "stages_per_rank is 3, expected 1 with the schedule gpipe");
  EXPECT_EQ(message({SL_SCHEDULE_ZBV, 2, 1, 4}), "stages_per_rank is 1, expected 2 with the schedule zbv");
  EXPECT_EQ(message({SL_SCHEDULE_INTERLEAVED, 2, 1, 4}),
            "stages_per_rank is 1, expected at least 2 with the schedule interleaved; with 1 it is the schedule 1f1b");
  EXPECT_EQ(message({SL_SCHEDULE_INTERLEAVED, 4, 2, 9}),
            "micro_batches is 9, expected a number that divides into 2 rounds over 4 ranks, such as 8 or 12");
  EXPECT_EQ(message({SL_SCHEDULE_1F1B, 1 << 16, 1, 1 << 20}),
            "micro_batches is 1048576 with 65536 stages, expected at most 2147483648 pieces of work of a kind");
  sl_schedule schedule{SL_SCHEDULE_1F1B, 2, 1, 4};
  int64_t number;
  sl_work order[8];
  EXPECT_EQ(sl_schedule_work_count(nullptr, &number), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_schedule_work_count(&schedule, nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_schedule_order(&schedule, 0, nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_schedule_stage_rank(&schedule, 0, nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_schedule_order(&schedule, 2, order), SL_OUT_OF_RANGE);
  EXPECT_STREQ(sl_last_error(), "rank is 2, expected 0 to 1");
  EXPECT_EQ(sl_schedule_stage_rank(&schedule, -1, &number), SL_OUT_OF_RANGE);
  EXPECT_STREQ(sl_last_error(), "stage is -1, expected 0 to 1");
}

}  // namespace
}  // namespace sluice_test

/* What the others see when a rank dies, stops, leaves, or does something else; on processes that stand for ranks. */
#include <dirent.h>

#include <cstring>

#include "comm_ranks.h"

namespace {

using ranks::Outcome;
using ranks::run_processes;

const size_t large = 1 << 20; /* elements */

/* A fraction of a second on a quiet machine, and far from the timeout of a minute on any. */
const double at_once = 10;

/* Every collective, by name, as one call on float buffers of a size. */
struct Collective {
  const char *name;
  sl_status (*call)(sl_comm *comm, int rank, int size, size_t count, int64_t timeout);
};

struct Buffers {
  std::vector<float> in, out;
  std::vector<const void *> give;
  std::vector<void *> take;
  std::vector<size_t> bytes, counts;
  Buffers(int size, size_t count) : in(count * static_cast<size_t>(size)), out(count * static_cast<size_t>(size)) {
    for (int i = 0; i < size; ++i) {
      give.push_back(in.data() + count * static_cast<size_t>(i));
      take.push_back(out.data() + count * static_cast<size_t>(i));
      bytes.push_back(count * 4);
      counts.push_back(count);
    }
  }
};

const Collective collectives[] = {
    {"barrier", [](sl_comm *comm, int, int, size_t, int64_t timeout) { return sl_comm_barrier(comm, timeout); }},
    {"broadcast",
     [](sl_comm *comm, int, int size, size_t count, int64_t timeout) {
       Buffers b(size, count);
       return sl_comm_broadcast(comm, b.in.data(), count * 4, 1, timeout);
     }},
    {"all_reduce",
     [](sl_comm *comm, int, int size, size_t count, int64_t timeout) {
       Buffers b(size, count);
       return sl_comm_all_reduce(comm, b.in.data(), b.out.data(), count, SL_F32, SL_REDUCE_SUM, 0, timeout);
     }},
    {"reduce",
     [](sl_comm *comm, int, int size, size_t count, int64_t timeout) {
       Buffers b(size, count);
       return sl_comm_reduce(comm, b.in.data(), b.out.data(), count, SL_F32, SL_REDUCE_SUM, 0, 0, timeout);
     }},
    {"reduce_scatter",
     [](sl_comm *comm, int, int size, size_t count, int64_t timeout) {
       Buffers b(size, count);
       return sl_comm_reduce_scatter(comm, b.give.data(), b.counts.data(), b.out.data(), SL_F32, SL_REDUCE_SUM, 0,
                                     timeout);
     }},
    {"all_gather",
     [](sl_comm *comm, int, int size, size_t count, int64_t timeout) {
       Buffers b(size, count);
       return sl_comm_all_gather(comm, b.in.data(), count * 4, b.take.data(), b.bytes.data(), timeout);
     }},
    {"gather",
     [](sl_comm *comm, int, int size, size_t count, int64_t timeout) {
       Buffers b(size, count);
       return sl_comm_gather(comm, b.in.data(), count * 4, b.take.data(), b.bytes.data(), 0, timeout);
     }},
    {"scatter",
     [](sl_comm *comm, int, int size, size_t count, int64_t timeout) {
       Buffers b(size, count);
       return sl_comm_scatter(comm, b.give.data(), b.bytes.data(), b.out.data(), count * 4, 1, timeout);
     }},
    {"all_to_all",
     [](sl_comm *comm, int, int size, size_t count, int64_t timeout) {
       Buffers b(size, count);
       return sl_comm_all_to_all(comm, b.give.data(), b.bytes.data(), b.take.data(), b.bytes.data(), timeout);
     }},
};

class CommFaults : public testing::TestWithParam<Collective> {};
INSTANTIATE_TEST_SUITE_P(Collectives, CommFaults, testing::ValuesIn(collectives),
                         [](const testing::TestParamInfo<Collective> &one) { return std::string(one.param.name); });

/* Calls in a row until one fails, as a training loop would. */
sl_status run_until_it_fails(const Collective &collective, sl_comm *comm, int rank, int size, size_t count,
                             int64_t timeout) {
  sl_status status = SL_OK;
  for (int i = 0; i < 100000 && status == SL_OK; ++i) {
    status = collective.call(comm, rank, size, count, timeout);
    /* So that a root, which may run ahead, is held back. */
    if (status == SL_OK && i % 4 == 3) status = sl_comm_barrier(comm, timeout);
  }
  return status;
}

TEST_P(CommFaults, AKilledRankIsNoticedByAllWithinASecond) {
  for (size_t count : {size_t(16), large}) {
    std::vector<Outcome> outcomes = run_processes(
        3, [&](sl_comm *comm, int rank) { return run_until_it_fails(GetParam(), comm, rank, 3, count, 60000); },
        [](const std::vector<int> &processes) {
          usleep(50000);
          kill(processes[1], SIGKILL);
        });
    EXPECT_EQ(outcomes[1].text, "ended");
    for (int rank : {0, 2}) {
      EXPECT_EQ(outcomes[rank].status, SL_PEER_LOST) << outcomes[rank].text;
      EXPECT_NE(outcomes[rank].text.find("rank 1 (process " + std::to_string(outcomes[1].process) + ")"),
                std::string::npos)
          << outcomes[rank].text;
      EXPECT_LT(outcomes[rank].seconds, at_once);
    }
    bool named = outcomes[0].text.find(GetParam().name) != std::string::npos ||
                 outcomes[0].text.find("barrier") != std::string::npos;
    EXPECT_TRUE(named) << outcomes[0].text;
  }
}

TEST_P(CommFaults, AStoppedRankIsNamedAtTheTimeout) {
  std::vector<Outcome> outcomes = run_processes(
      3, [&](sl_comm *comm, int rank) { return run_until_it_fails(GetParam(), comm, rank, 3, 16, 600); },
      [](const std::vector<int> &processes) {
        usleep(20000);
        kill(processes[1], SIGSTOP);
        usleep(1600000);
        kill(processes[1], SIGCONT);
      });
  for (int rank : {0, 2}) {
    EXPECT_EQ(outcomes[rank].status, SL_TIMEOUT) << outcomes[rank].text;
    EXPECT_NE(
        outcomes[rank].text.find("rank 1 (process " + std::to_string(outcomes[1].process) + "), which is stopped"),
        std::string::npos)
        << outcomes[rank].text;
  }
  EXPECT_EQ(outcomes[1].status, SL_TIMEOUT) << outcomes[1].text;
}

TEST_P(CommFaults, ARankThatLeavesIsNamed) {
  std::vector<Outcome> outcomes = run_processes(2, [&](sl_comm *comm, int rank) {
    if (rank == 1) {
      sl_comm_close(comm);
      return SL_OK;
    }
    sl_status status = run_until_it_fails(GetParam(), comm, rank, 2, 16, 60000);
    return status;
  });
  EXPECT_EQ(outcomes[1].status, SL_OK);
  EXPECT_EQ(outcomes[0].status, SL_PEER_LOST) << outcomes[0].text;
  EXPECT_NE(outcomes[0].text.find("has left the group"), std::string::npos) << outcomes[0].text;
}

/* Each collective against every other one. */
TEST_P(CommFaults, ADifferentCollectiveIsNamedOnBothSides) {
  for (const Collective &other : collectives) {
    if (other.call == GetParam().call) continue;
    std::vector<Outcome> outcomes = run_processes(2, [&](sl_comm *comm, int rank) {
      sl_status status = (rank ? other : GetParam()).call(comm, rank, 2, 16, 5000);
      return status == SL_OK ? sl_comm_barrier(comm, 5000) : status; /* a root may have got away with it */
    });
    for (const Outcome &outcome : outcomes) {
      EXPECT_EQ(outcome.status, SL_MISMATCH) << GetParam().name << " and " << other.name << ": " << outcome.text;
    }
    EXPECT_NE(outcomes[0].text.find(std::string("is in ")), std::string::npos);
  }
}

TEST(CommMismatch, OfSizeDtypeOperatorAndRoot) {
  struct Case {
    size_t count;
    sl_dtype dtype;
    sl_reduce_op op;
    int root;
  };
  const Case usual = {64, SL_F32, SL_REDUCE_SUM, 0};
  for (Case other : {Case{65, SL_F32, SL_REDUCE_SUM, 0}, Case{64, SL_I32, SL_REDUCE_SUM, 0},
                     Case{64, SL_F32, SL_REDUCE_MAX, 0}, Case{64, SL_F32, SL_REDUCE_SUM, 1}}) {
    std::vector<Outcome> outcomes = run_processes(2, [&](sl_comm *comm, int rank) {
      std::vector<char> in(4096), out(4096);
      Case mine = rank ? other : usual;
      sl_status status =
          sl_comm_reduce(comm, in.data(), out.data(), mine.count, mine.dtype, mine.op, 0, mine.root, 5000);
      return status == SL_OK ? sl_comm_barrier(comm, 5000) : status;
    });
    for (const Outcome &outcome : outcomes) EXPECT_EQ(outcome.status, SL_MISMATCH) << outcome.text;
  }
}

TEST(CommMismatch, OfGatheredSizes) {
  std::vector<Outcome> outcomes = run_processes(2, [&](sl_comm *comm, int rank) {
    std::vector<char> in(4096), a(4096), b(4096);
    void *out[] = {a.data(), b.data()};
    size_t bytes[] = {100, rank ? 50u : 60u};
    sl_status status = sl_comm_all_gather(comm, in.data(), bytes[rank], out, bytes, 5000);
    return status == SL_OK ? sl_comm_barrier(comm, 5000) : status; /* rank 1 got what it expected */
  });
  for (const Outcome &outcome : outcomes) {
    EXPECT_EQ(outcome.status, SL_MISMATCH);
    EXPECT_NE(outcome.text.find(") 50 bytes, which expects 60"), std::string::npos) << outcome.text;
  }
}

TEST(CommAbort, WakesWhoeverWaits) {
  std::vector<Outcome> outcomes = run_processes(2, [&](sl_comm *comm, int rank) {
    if (rank == 0) return sl_comm_barrier(comm, 60000);
    usleep(50000);
    sl_comm_abort(comm, "the loss is NaN");
    return sl_comm_state(comm);
  });
  for (const Outcome &outcome : outcomes) {
    EXPECT_EQ(outcome.status, SL_PEER_LOST);
    EXPECT_NE(outcome.text.find("has aborted the group: the loss is NaN"), std::string::npos) << outcome.text;
  }
}

int count_files(const char *folder) {
  int count = 0;
  DIR *directory = opendir(folder);
  if (!directory) return -1;
  while (readdir(directory)) ++count;
  closedir(directory);
  return count;
}

TEST(CommRemains, NothingIsLeftWhenAllRanksAreKilled) {
  int files = count_files("/dev/shm"), descriptors = count_files("/proc/self/fd");
  run_processes(
      3, [](sl_comm *comm, int) { return run_until_it_fails(collectives[2], comm, 0, 3, large, 60000); },
      [](const std::vector<int> &processes) {
        usleep(20000);
        for (int process : processes) kill(process, SIGKILL);
      });
  EXPECT_EQ(count_files("/dev/shm"), files);
  EXPECT_EQ(count_files("/proc/self/fd"), descriptors);
}

TEST(CommHosts, AnAliasMakesAnotherHost) {
  char one[SL_COMM_TEXT], same[SL_COMM_TEXT], other[SL_COMM_TEXT];
  ASSERT_EQ(sl_comm_host_identity(one), SL_OK) << sl_last_error();
  ASSERT_EQ(sl_comm_host_identity(same), SL_OK);
  EXPECT_STREQ(one, same);
  setenv("SLUICE_COMM_HOST", "b", 1);
  ASSERT_EQ(sl_comm_host_identity(other), SL_OK);
  unsetenv("SLUICE_COMM_HOST");
  EXPECT_STRNE(one, other);
}

}  // namespace

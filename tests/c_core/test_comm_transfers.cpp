/* Sending and receiving: sizes on both sides of every boundary, tags, any rank, many at a time, faults. */
#include <cstring>
#include <random>

#include "comm/inbox_size.h"
#include "comm_ranks.h"

namespace {

using ranks::Outcome;

const int64_t timeout = 30000;

std::vector<char> content(size_t bytes, unsigned seed) {
  std::vector<char> result(bytes);
  for (size_t i = 0; i < bytes; ++i) result[i] = static_cast<char>(i * 31 + seed * 7 + i / 251);
  return result;
}

sl_status send(sl_comm *comm, const std::vector<char> &buffer, int rank, uint64_t tag = 0) {
  sl_transfer *transfer;
  sl_status status = sl_comm_send(comm, buffer.data(), buffer.size(), rank, tag, &transfer);
  if (status == SL_OK) status = sl_transfer_wait(transfer, timeout);
  if (status == SL_OK) sl_transfer_free(transfer);
  return status;
}

sl_status receive(sl_comm *comm, std::vector<char> *buffer, int rank, uint64_t tag = 0, int *from = nullptr,
                  int64_t limit = timeout) {
  sl_transfer *transfer;
  sl_status status = sl_comm_receive(comm, buffer->data(), buffer->size(), rank, tag, &transfer);
  if (status == SL_OK) status = sl_transfer_wait(transfer, limit);
  if (status == SL_OK && from) *from = sl_transfer_peer(transfer);
  if (status == SL_OK) sl_transfer_free(transfer);
  return status;
}

/* With reading of other processes' memory, and without. */
class Transfers : public testing::TestWithParam<bool> {
 protected:
  void run_threads(int size, const ranks::Body &body) {
    sl_comm_tuning tuning = make_tuning(size);
    ranks::run_threads(size, body, 0, &tuning);
  }
  std::vector<Outcome> run_processes(int size, const ranks::Call &call,
                                     const std::function<void(const std::vector<int> &)> &meddle = nullptr) {
    sl_comm_tuning tuning = make_tuning(size);
    return ranks::run_processes(size, call, meddle, 0, &tuning);
  }

 private:
  static sl_comm_tuning make_tuning(int size) {
    sl_comm_tuning tuning;
    sl_comm_default_tuning(size, &tuning);
    tuning.direct_send = GetParam() ? 0 : SIZE_MAX;
    tuning.streaming = 1 << 20;
    return tuning;
  }
};
INSTANTIATE_TEST_SUITE_P(Ways, Transfers, testing::Bool(),
                         [](const testing::TestParamInfo<bool> &way) { return way.param ? "direct" : "pieces"; });

const size_t sizes[] = {0, 1, 100, SL_INBOX_CONTENT - 1, SL_INBOX_CONTENT, SL_INBOX_CONTENT + 1, 50000, 3000000};

TEST_P(Transfers, ThereAndBack) {
  run_threads(2, [](sl_comm *comm, int rank) {
    for (size_t bytes : sizes) {
      std::vector<char> buffer(bytes);
      if (rank == 0) {
        ASSERT_EQ(send(comm, content(bytes, 1), 1), SL_OK) << sl_last_error();
        ASSERT_EQ(receive(comm, &buffer, 1), SL_OK) << sl_last_error();
        EXPECT_EQ(buffer, content(bytes, 2));
      } else {
        ASSERT_EQ(receive(comm, &buffer, 0), SL_OK) << sl_last_error();
        EXPECT_EQ(buffer, content(bytes, 1));
        ASSERT_EQ(send(comm, content(bytes, 2), 0), SL_OK) << sl_last_error();
      }
    }
  });
}

TEST_P(Transfers, BetweenProcesses) {
  std::vector<Outcome> outcomes = run_processes(2, [](sl_comm *comm, int rank) {
    for (size_t bytes : sizes) {
      std::vector<char> buffer(bytes);
      sl_status status = rank == 0 ? send(comm, content(bytes, 1), 1) : receive(comm, &buffer, 0);
      if (status != SL_OK) return status;
      if (rank == 1 && buffer != content(bytes, 1)) return SL_MISMATCH;
    }
    return SL_OK;
  });
  for (const Outcome &outcome : outcomes) EXPECT_EQ(outcome.status, SL_OK) << outcome.text;
}

/* Everybody sends to everybody before anybody receives. */
TEST_P(Transfers, AllAtOnceBothWays) {
  run_threads(4, [](sl_comm *comm, int rank) {
    for (size_t bytes : {size_t(10), size_t(100000)}) {
      std::vector<sl_transfer *> pending;
      std::vector<std::vector<char>> out, in(4, std::vector<char>(bytes));
      for (int i = 0; i < 4; ++i) out.push_back(content(bytes, static_cast<unsigned>(rank * 4 + i)));
      for (int i = 0; i < 4; ++i) {
        if (i == rank) continue;
        sl_transfer *transfer;
        ASSERT_EQ(sl_comm_send(comm, out[i].data(), bytes, i, 5, &transfer), SL_OK);
        pending.push_back(transfer);
        ASSERT_EQ(sl_comm_receive(comm, in[i].data(), bytes, i, 5, &transfer), SL_OK);
        pending.push_back(transfer);
      }
      for (sl_transfer *transfer : pending) {
        ASSERT_EQ(sl_transfer_wait(transfer, timeout), SL_OK) << sl_last_error();
        sl_transfer_free(transfer);
      }
      for (int i = 0; i < 4; ++i) {
        if (i != rank) {
          EXPECT_EQ(in[i], content(bytes, static_cast<unsigned>(i * 4 + rank)));
        }
      }
    }
  });
}

TEST_P(Transfers, TagsChooseAndOrderHoldsWithinATag) {
  run_threads(2, [](sl_comm *comm, int rank) {
    if (rank == 0) {
      for (unsigned i = 0; i < 6; ++i) ASSERT_EQ(send(comm, content(64, i), 1, i % 2), SL_OK);
    } else {
      std::vector<char> buffer(64);
      for (unsigned i : {1u, 3u, 0u, 2u, 5u, 4u}) {
        ASSERT_EQ(receive(comm, &buffer, 0, i % 2), SL_OK);
        EXPECT_EQ(buffer, content(64, i)) << i;
      }
    }
  });
}

TEST_P(Transfers, FromAnyRank) {
  run_threads(4, [](sl_comm *comm, int rank) {
    if (rank > 0) {
      ASSERT_EQ(send(comm, content(20000, static_cast<unsigned>(rank)), 0, 9), SL_OK);
    } else {
      std::vector<char> buffer(20000);
      std::vector<int> seen(4);
      for (int i = 1; i < 4; ++i) {
        int from = -5;
        ASSERT_EQ(receive(comm, &buffer, SL_COMM_ANY_RANK, 9, &from), SL_OK);
        ASSERT_GE(from, 1);
        ++seen[from];
        EXPECT_EQ(buffer, content(20000, static_cast<unsigned>(from)));
      }
      EXPECT_EQ(seen, (std::vector<int>{0, 1, 1, 1}));
    }
  });
}

/* More than an inbox holds, from several ranks, before the receiver looks. */
TEST_P(Transfers, AFullInboxLosesNothing) {
  run_threads(3, [](sl_comm *comm, int rank) {
    const unsigned count = 3 * SL_INBOX_SLOTS;
    if (rank > 0) {
      std::vector<sl_transfer *> pending(count);
      std::vector<std::vector<char>> out;
      for (unsigned i = 0; i < count; ++i) out.push_back(content(i, i));
      for (unsigned i = 0; i < count; ++i)
        ASSERT_EQ(sl_comm_send(comm, out[i].data(), out[i].size(), 0, 1, &pending[i]), SL_OK);
      for (sl_transfer *transfer : pending) {
        ASSERT_EQ(sl_transfer_wait(transfer, timeout), SL_OK) << sl_last_error();
        sl_transfer_free(transfer);
      }
    } else {
      usleep(50000);
      for (unsigned i = 0; i < count; ++i) {
        for (int from : {1, 2}) {
          std::vector<char> buffer(i);
          ASSERT_EQ(receive(comm, &buffer, from, 1), SL_OK) << sl_last_error();
          EXPECT_EQ(buffer, content(i, i));
        }
      }
    }
  });
}

/* Several threads of a rank, each with a tag of its own, beside collectives of the rank. */
TEST_P(Transfers, FromSeveralThreadsBesideCollectives) {
  run_threads(2, [](sl_comm *comm, int rank) {
    std::vector<std::thread> threads;
    for (unsigned tag = 0; tag < 3; ++tag) {
      threads.emplace_back([=] {
        for (unsigned i = 0; i < 40; ++i) {
          size_t bytes = (i * 997 * (tag + 1)) % 40000;
          std::vector<char> buffer(bytes);
          if (rank == 0) {
            ASSERT_EQ(send(comm, content(bytes, i), 1, tag), SL_OK) << sl_last_error();
          } else {
            ASSERT_EQ(receive(comm, &buffer, 0, tag), SL_OK) << sl_last_error();
            ASSERT_EQ(buffer, content(bytes, i));
          }
        }
      });
    }
    for (int i = 0; i < 100; ++i) ASSERT_EQ(sl_comm_barrier(comm, timeout), SL_OK) << sl_last_error();
    for (auto &thread : threads) thread.join();
  });
}

TEST_P(Transfers, ARandomMixAgainstWhatWasSent) {
  run_threads(3, [](sl_comm *comm, int rank) {
    std::mt19937 random(5); /* the same plan on each rank */
    for (int round = 0; round < 40; ++round) {
      struct Plan {
        int from, to;
        uint64_t tag;
        size_t bytes;
      };
      std::vector<Plan> plans;
      for (int i = 0; i < 12; ++i) {
        int from = static_cast<int>(random() % 3), to = (from + 1 + static_cast<int>(random() % 2)) % 3;
        plans.push_back({from, to, static_cast<uint64_t>(i), random() % (random() % 3 ? 300 : 60000)});
      }
      std::vector<std::vector<char>> buffers;
      std::vector<sl_transfer *> pending;
      std::vector<size_t> received;
      for (size_t i = 0; i < plans.size(); ++i)
        buffers.push_back(rank == plans[i].from ? content(plans[i].bytes, static_cast<unsigned>(i))
                                                : std::vector<char>(plans[i].bytes));
      unsigned offset = static_cast<unsigned>(rank) * 5; /* each in another order */
      for (size_t k = 0; k < plans.size(); ++k) {
        size_t i = (k + offset) % plans.size();
        const Plan &plan = plans[i];
        sl_transfer *transfer = nullptr;
        if (rank == plan.from) {
          ASSERT_EQ(sl_comm_send(comm, buffers[i].data(), plan.bytes, plan.to, plan.tag, &transfer), SL_OK);
        } else if (rank == plan.to) {
          ASSERT_EQ(sl_comm_receive(comm, buffers[i].data(), plan.bytes, plan.from, plan.tag, &transfer), SL_OK);
          received.push_back(i);
        }
        if (transfer) pending.push_back(transfer);
      }
      for (sl_transfer *transfer : pending) {
        ASSERT_EQ(sl_transfer_wait(transfer, timeout), SL_OK) << sl_last_error();
        sl_transfer_free(transfer);
      }
      for (size_t i : received) ASSERT_EQ(buffers[i], content(plans[i].bytes, static_cast<unsigned>(i)));
    }
  });
}

TEST_P(Transfers, SizesThatDifferAreAnErrorOnBothSides) {
  for (size_t bytes : {size_t(100), size_t(50000)}) {
    std::vector<Outcome> outcomes = run_processes(2, [&](sl_comm *comm, int rank) {
      std::vector<char> buffer(bytes + 8);
      sl_status status = rank == 0 ? send(comm, content(bytes, 0), 1, 3) : receive(comm, &buffer, 0, 3);
      return status == SL_OK ? sl_comm_barrier(comm, timeout) : status;
    });
    for (const Outcome &outcome : outcomes) {
      EXPECT_EQ(outcome.status, SL_MISMATCH) << outcome.text;
      EXPECT_NE(outcome.text.find("sends " + std::to_string(bytes) + " bytes to a recv of " +
                                  std::to_string(bytes + 8) + " bytes"),
                std::string::npos)
          << outcome.text;
    }
  }
}

TEST_P(Transfers, AKilledRankIsNoticed) {
  for (bool sends : {false, true}) {
    std::vector<Outcome> outcomes = run_processes(
        2,
        [&](sl_comm *comm, int rank) {
          std::vector<char> buffer(1 << 20);
          if (rank == 1) pause();
          return sends ? send(comm, buffer, 1) : receive(comm, &buffer, 1, 0, nullptr, 60000);
        },
        [](const std::vector<int> &processes) {
          usleep(30000);
          kill(processes[1], SIGKILL);
        });
    EXPECT_EQ(outcomes[0].status, SL_PEER_LOST) << outcomes[0].text;
    EXPECT_NE(outcomes[0].text.find("rank 1 (process " + std::to_string(outcomes[1].process) + ") has ended"),
              std::string::npos)
        << outcomes[0].text;
    EXPECT_NE(outcomes[0].text.find(sends ? "send of" : "recv of"), std::string::npos) << outcomes[0].text;
    EXPECT_LT(outcomes[0].seconds, 10); /* at once, not at the timeout of a minute */
  }
}

TEST_P(Transfers, AKilledRankIsFoundByLookingAfterATransferThatNobodyWaitsFor) {
  std::vector<Outcome> outcomes = run_processes(
      2,
      [](sl_comm *comm, int rank) {
        std::vector<char> buffer(1 << 20);
        if (rank == 1) pause();
        sl_transfer *transfer;
        sl_status status = sl_comm_send(comm, buffer.data(), buffer.size(), 1, 0, &transfer);
        if (status == SL_OK) status = sl_transfer_look_after(transfer); /* all is well so far */
        if (status != SL_OK) return SL_INTERNAL;
        for (int tries = 0; tries < 1000 && status == SL_OK; ++tries) {
          usleep(10000);
          status = sl_transfer_look_after(transfer);
        }
        return status;
      },
      [](const std::vector<int> &processes) {
        usleep(30000);
        kill(processes[1], SIGKILL);
      });
  EXPECT_EQ(outcomes[0].status, SL_PEER_LOST) << outcomes[0].text;
  EXPECT_NE(outcomes[0].text.find("has ended; it was awaited for send of"), std::string::npos) << outcomes[0].text;
}

TEST(TransferFaults, TimeoutNamesTheTransfer) {
  std::vector<Outcome> outcomes = ranks::run_processes(2, [](sl_comm *comm, int rank) {
    std::vector<char> buffer(10);
    if (rank == 0) return receive(comm, &buffer, 1, 7, nullptr, 100);
    usleep(300000);
    return sl_comm_state(comm);
  });
  for (const Outcome &outcome : outcomes) {
    EXPECT_EQ(outcome.status, SL_TIMEOUT);
    EXPECT_NE(outcome.text.find("timeout in recv of 10 bytes from rank 1"), std::string::npos) << outcome.text;
  }
}

TEST(TransferFaults, WhatWasSentBeforeLeavingArrives) {
  std::vector<Outcome> outcomes = ranks::run_processes(2, [](sl_comm *comm, int rank) {
    std::vector<char> buffer(10);
    if (rank == 0) {
      sl_status status = send(comm, buffer, 1);
      sl_comm_close(comm);
      return status;
    }
    usleep(200000);
    sl_status status = receive(comm, &buffer, 0);
    if (status != SL_OK) return status;
    return receive(comm, &buffer, 0) == SL_PEER_LOST ? SL_OK : SL_INTERNAL;
  });
  for (const Outcome &outcome : outcomes) EXPECT_EQ(outcome.status, SL_OK) << outcome.text;
}

TEST(TransferArguments, AreChecked) {
  ranks::run_threads(2, [](sl_comm *comm, int rank) {
    sl_transfer *transfer;
    char byte = 0;
    EXPECT_EQ(sl_comm_send(comm, &byte, 1, rank, 0, &transfer), SL_INVALID_ARGUMENT);
    EXPECT_STREQ(sl_last_error(),
                 rank ? "rank is 1, expected another rank of 0 to 1" : "rank is 0, expected another rank of 0 to 1");
    EXPECT_EQ(sl_comm_send(comm, &byte, 1, SL_COMM_ANY_RANK, 0, &transfer), SL_INVALID_ARGUMENT);
    EXPECT_EQ(sl_comm_receive(comm, nullptr, 1, 1 - rank, 0, &transfer), SL_INVALID_ARGUMENT);
    EXPECT_EQ(sl_comm_receive(nullptr, &byte, 1, 0, 0, &transfer), SL_INVALID_ARGUMENT);
    /* A receive that nothing has matched can be called off. */
    ASSERT_EQ(sl_comm_receive(comm, &byte, 1, 1 - rank, 0, &transfer), SL_OK);
    bool done = true;
    EXPECT_EQ(sl_transfer_test(transfer, &done), SL_OK);
    EXPECT_FALSE(done);
    sl_transfer_free(transfer);
    EXPECT_EQ(sl_comm_barrier(comm, timeout), SL_OK);
  });
}

}  // namespace

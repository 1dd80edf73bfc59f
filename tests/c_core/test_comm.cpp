/* Collectives over shared memory against what they mean, on threads that stand for ranks; and bad arguments. */
#include <cstring>
#include <random>

#include "comm_ranks.h"

namespace {

using ranks::run_threads;

const int64_t timeout = 30000;

/* A value for each rank and place, exactly representable, so that sums are exact in any order. */
float value_of(int rank, size_t i) { return static_cast<float>((i * 7 + static_cast<size_t>(rank) * 13) % 101) - 50; }

std::vector<float> values(int rank, size_t count, size_t shift = 0) {
  std::vector<float> result(count);
  for (size_t i = 0; i < count; ++i) result[i] = value_of(rank, i + shift);
  return result;
}

std::vector<float> sums(int size, size_t count, size_t shift = 0) {
  std::vector<float> result(count, 0);
  for (int rank = 0; rank < size; ++rank)
    for (size_t i = 0; i < count; ++i) result[i] += value_of(rank, i + shift);
  return result;
}

/* Sizes of the group, elements, and how the algorithms are chosen. */
struct Shape {
  int size;
  size_t count;
  bool direct;
};

class Comm : public testing::TestWithParam<Shape> {
 protected:
  void run(const ranks::Body &body) {
    sl_comm_tuning tuning;
    sl_comm_default_tuning(GetParam().size, &tuning);
    tuning.piece = 16 << 10;
    tuning.flat = 1 << 10;
    tuning.direct = tuning.direct_send = GetParam().direct ? 2 << 10 : SIZE_MAX;
    tuning.streaming = 8 << 10;
    tuning.buffer_streaming = 4 << 10;
    run_threads(GetParam().size, body, 64 << 10, &tuning);
  }
  int size = GetParam().size;
  size_t count = GetParam().count;
};

std::vector<Shape> shapes() {
  std::vector<Shape> result;
  for (int size : {1, 2, 3, 5, 8}) {
    for (size_t count : {0, 1, 3, 200, 5000, 40011}) {
      for (bool direct : {false, true})
        if (!direct || count > 200) result.push_back({size, count, direct});
    }
  }
  return result;
}

std::string name_of(const testing::TestParamInfo<Shape> &info) {
  return std::to_string(info.param.size) + "ranks_" + std::to_string(info.param.count) +
         (info.param.direct ? "_direct" : "");
}

INSTANTIATE_TEST_SUITE_P(Shapes, Comm, testing::ValuesIn(shapes()), name_of);

TEST_P(Comm, AllReduce) {
  run([&](sl_comm *comm, int rank) {
    std::vector<float> in = values(rank, count), out(count, -1);
    ASSERT_EQ(sl_comm_all_reduce(comm, in.data(), out.data(), count, SL_F32, SL_REDUCE_SUM, 0, timeout), SL_OK)
        << sl_last_error();
    EXPECT_EQ(out, sums(size, count));
    EXPECT_EQ(in, values(rank, count));
    ASSERT_EQ(sl_comm_all_reduce(comm, in.data(), in.data(), count, SL_F32, SL_REDUCE_SUM, 0, timeout), SL_OK);
    EXPECT_EQ(in, out);
  });
}

TEST_P(Comm, Reduce) {
  run([&](sl_comm *comm, int rank) {
    for (int root = 0; root < size; ++root) {
      std::vector<float> in = values(rank, count), out(count, -1);
      ASSERT_EQ(sl_comm_reduce(comm, in.data(), rank == root ? out.data() : nullptr, count, SL_F32, SL_REDUCE_MAX, 0,
                               root, timeout),
                SL_OK)
          << sl_last_error();
      if (rank != root) continue;
      for (size_t i = 0; i < count; ++i) {
        float most = value_of(0, i);
        for (int other = 1; other < size; ++other) most = std::max(most, value_of(other, i));
        ASSERT_EQ(out[i], most) << i;
      }
    }
  });
}

/* Parts of other sizes for each rank, some of them empty. */
size_t part_of(int rank, size_t count) { return rank == 1 ? 0 : count / (static_cast<size_t>(rank) + 1); }

TEST_P(Comm, ReduceScatter) {
  for (bool even : {true, false}) {
    run([&](sl_comm *comm, int rank) {
      std::vector<std::vector<float>> inputs;
      std::vector<const void *> in;
      std::vector<size_t> counts;
      for (int i = 0; i < size; ++i) {
        counts.push_back(even ? count : part_of(i, count));
        inputs.push_back(values(rank, counts[i], static_cast<size_t>(i)));
        in.push_back(inputs[i].data());
      }
      std::vector<float> out(counts[rank], -1);
      ASSERT_EQ(sl_comm_reduce_scatter(comm, in.data(), counts.data(), out.data(), SL_F32, SL_REDUCE_SUM, 0, timeout),
                SL_OK)
          << sl_last_error();
      EXPECT_EQ(out, sums(size, counts[rank], static_cast<size_t>(rank)));
    });
  }
}

TEST_P(Comm, Broadcast) {
  run([&](sl_comm *comm, int rank) {
    for (int root = 0; root < size; ++root) {
      std::vector<float> buffer = values(rank, count);
      ASSERT_EQ(sl_comm_broadcast(comm, buffer.data(), count * 4, root, timeout), SL_OK) << sl_last_error();
      EXPECT_EQ(buffer, values(root, count));
    }
  });
}

TEST_P(Comm, AllGatherAndGather) {
  for (bool even : {true, false}) {
    run([&](sl_comm *comm, int rank) {
      auto part = [&](int i) { return even ? count : part_of(i, count); };
      std::vector<float> in = values(rank, part(rank));
      for (int root = -1; root < size; ++root) {
        std::vector<std::vector<float>> outputs;
        std::vector<void *> out;
        std::vector<size_t> bytes;
        for (int i = 0; i < size; ++i) {
          outputs.emplace_back(part(i), -1.f);
          bytes.push_back(part(i) * 4);
        }
        for (auto &output : outputs) out.push_back(output.data());
        bool takes = root < 0 || root == rank;
        sl_status status = root < 0
                               ? sl_comm_all_gather(comm, in.data(), bytes[rank], out.data(), bytes.data(), timeout)
                               : sl_comm_gather(comm, in.data(), bytes[rank], takes ? out.data() : nullptr,
                                                takes ? bytes.data() : nullptr, root, timeout);
        ASSERT_EQ(status, SL_OK) << sl_last_error();
        for (int i = 0; takes && i < size; ++i) EXPECT_EQ(outputs[i], values(i, part(i)));
      }
    });
  }
}

TEST_P(Comm, Scatter) {
  for (bool even : {true, false}) {
    run([&](sl_comm *comm, int rank) {
      auto part = [&](int i) { return even ? count : part_of(i, count); };
      for (int root = 0; root < size; ++root) {
        std::vector<std::vector<float>> inputs;
        std::vector<const void *> in;
        std::vector<size_t> bytes;
        for (int i = 0; i < size; ++i) {
          inputs.push_back(values(root, part(i), static_cast<size_t>(i)));
          bytes.push_back(part(i) * 4);
        }
        for (auto &input : inputs) in.push_back(input.data());
        std::vector<float> out(part(rank), -1);
        bool gives = root == rank;
        ASSERT_EQ(sl_comm_scatter(comm, gives ? in.data() : nullptr, gives ? bytes.data() : nullptr, out.data(),
                                  bytes[rank], root, timeout),
                  SL_OK)
            << sl_last_error();
        EXPECT_EQ(out, values(root, part(rank), static_cast<size_t>(rank)));
      }
    });
  }
}

TEST_P(Comm, AllToAll) {
  for (bool even : {true, false}) {
    run([&](sl_comm *comm, int rank) {
      auto part = [&](int from, int to) {
        return even ? count : (from == 1 && to == 0 ? 0 : count * static_cast<size_t>(from + 2 * to + 1) / 16);
      };
      std::vector<std::vector<float>> inputs, outputs;
      std::vector<const void *> in;
      std::vector<void *> out;
      std::vector<size_t> in_bytes, out_bytes;
      for (int i = 0; i < size; ++i) {
        inputs.push_back(values(rank, part(rank, i), static_cast<size_t>(i)));
        outputs.emplace_back(part(i, rank), -1.f);
        in_bytes.push_back(part(rank, i) * 4);
        out_bytes.push_back(part(i, rank) * 4);
      }
      for (int i = 0; i < size; ++i) in.push_back(inputs[i].data()), out.push_back(outputs[i].data());
      ASSERT_EQ(sl_comm_all_to_all(comm, in.data(), in_bytes.data(), out.data(), out_bytes.data(), timeout), SL_OK)
          << sl_last_error();
      for (int i = 0; i < size; ++i) EXPECT_EQ(outputs[i], values(i, part(i, rank), static_cast<size_t>(rank)));
    });
  }
}

/* Hundreds of calls of all kinds and sizes in a random order, the same on each rank: slots must never be overwritten
 * while someone still reads them. */
class CommSequence : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, CommSequence, testing::Values(1, 2, 3, 5, 8));

TEST_P(CommSequence, ManyCallsInARow) {
  int size = GetParam();
  sl_comm_tuning tuning = {1 << 10, 16 << 10, 24 << 10, 24 << 10, 8 << 10, 12 << 10};
  auto body = [&](sl_comm *comm, int rank) {
    std::mt19937 random(11);
    for (int call = 0; call < 300; ++call) {
      size_t n = random() % (random() % 4 ? 64 : 9000);
      int root = static_cast<int>(random() % static_cast<unsigned>(size));
      size_t shift = random() % 1000;
      std::vector<float> in = values(rank, n, shift), out(n, -1);
      switch (random() % 4) {
        case 0:
          ASSERT_EQ(sl_comm_all_reduce(comm, in.data(), out.data(), n, SL_F32, SL_REDUCE_SUM, 0, timeout), SL_OK);
          ASSERT_EQ(out, sums(size, n, shift));
          break;
        case 1:
          ASSERT_EQ(sl_comm_broadcast(comm, in.data(), n * 4, root, timeout), SL_OK);
          ASSERT_EQ(in, values(root, n, shift));
          break;
        case 2:
          ASSERT_EQ(sl_comm_reduce(comm, in.data(), out.data(), n, SL_F32, SL_REDUCE_SUM, 0, root, timeout), SL_OK);
          if (rank == root) {
            ASSERT_EQ(out, sums(size, n, shift));
          }
          break;
        default: ASSERT_EQ(sl_comm_barrier(comm, timeout), SL_OK);
      }
    }
  };
  run_threads(size, body, 64 << 10, &tuning);
}

TEST(CommReduction, HalfPrecisionIsSummedInFloat32AndRoundedOnce) {
  run_threads(3, [](sl_comm *comm, int rank) {
    /* 256 + 1 + 1: each sum alone would round back to 256 in bfloat16. */
    uint16_t in = rank == 0 ? 0x4380 : 0x3f80, out = 0;
    ASSERT_EQ(sl_comm_all_reduce(comm, &in, &out, 1, SL_BF16, SL_REDUCE_SUM, 0, timeout), SL_OK) << sl_last_error();
    EXPECT_EQ(out, 0x4381);
  });
}

TEST(CommArguments, AreCheckedAndNamed) {
  sl_comm *comm = nullptr;
  char handle[SL_COMM_TEXT];
  auto create = [&](int rank, int size) {
    sl_comm_options options = {rank, size, nullptr, 0, nullptr};
    return sl_comm_create(&options, &comm, handle);
  };
  EXPECT_EQ(create(0, 0), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "options.size is 0, expected 1 to 1024");
  EXPECT_EQ(create(2, 2), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "options.rank is 2, expected 0 to 1");
  EXPECT_EQ(create(1, 2), SL_INVALID_ARGUMENT);
  ASSERT_EQ(create(0, 1), SL_OK);
  float x = 1;
  EXPECT_EQ(sl_comm_barrier(comm, timeout), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "comm has not been started, expected sl_comm_start() before");
  ASSERT_EQ(sl_comm_start(comm, timeout), SL_OK);
  EXPECT_EQ(sl_comm_broadcast(comm, &x, 4, 1, timeout), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "root is 1, expected 0 to 0");
  EXPECT_EQ(sl_comm_broadcast(comm, nullptr, 4, 0, timeout), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(sl_last_error(), "buffer is NULL, expected 4 bytes");
  EXPECT_EQ(sl_comm_all_reduce(comm, &x, &x, SIZE_MAX / 2, SL_F32, SL_REDUCE_SUM, 0, timeout), SL_OUT_OF_RANGE);
  EXPECT_NE(sl_comm_all_reduce(comm, &x, &x, 1, SL_F32, SL_REDUCE_BAND, 0, timeout), SL_OK);
  size_t four = 4, eight = 8;
  void *out = &x;
  EXPECT_EQ(sl_comm_all_gather(comm, &x, 4, &out, &eight, timeout), SL_INVALID_ARGUMENT);
  EXPECT_EQ(sl_comm_all_gather(comm, &x, 4, &out, &four, timeout), SL_OK) << sl_last_error();
  sl_comm_close(comm);
  sl_comm_close(nullptr);
}

TEST(CommArguments, AHandleIsTrustedOnlyIfItsMemorySaysTheSame) {
  std::string handle;
  sl_comm *first = ranks::create(2, &handle);
  ASSERT_NE(first, nullptr);
  auto join = [&](const std::string &text, int rank = 1, int size = 2) {
    sl_comm_options options = {rank, size, nullptr, 0, nullptr};
    sl_comm *comm = nullptr;
    sl_status status = sl_comm_join(&options, text.c_str(), &comm);
    sl_comm_close(comm);
    return status;
  };
  EXPECT_EQ(join("nonsense"), SL_INVALID_ARGUMENT);
  EXPECT_EQ(join("memfd:1:2:"), SL_INVALID_ARGUMENT);
  std::string other = handle;
  other.back() = other.back() == '0' ? '1' : '0'; /* the right file, another nonce */
  EXPECT_EQ(join(other), SL_UNSUPPORTED) << sl_last_error();
  EXPECT_EQ(join("memfd:999999999:3:00000000000000000000000000000000"), SL_UNSUPPORTED);
  EXPECT_EQ(join(handle, 1, 3), SL_INVALID_ARGUMENT);
  EXPECT_STREQ(std::string(sl_last_error()).substr(0, 17).c_str(), "options.size is 3");
  EXPECT_EQ(join(handle, 0), SL_INVALID_ARGUMENT); /* taken */
  sl_comm_close(first);
}

TEST(CommStart, ARankThatNeverJoinsIsNamed) {
  std::string handle;
  sl_comm *first = ranks::create(2, &handle);
  EXPECT_EQ(sl_comm_start(first, 100), SL_TIMEOUT);
  EXPECT_STREQ(sl_last_error(), "timeout: rank 1 has not joined the group");
  EXPECT_EQ(sl_comm_state(first), SL_TIMEOUT);
  sl_comm_close(first);
}

}  // namespace

/* A soak: random collectives, sizes, types and operators on random groups of 2 to 8 threads that stand for ranks, with
 * transfers beside them, each against a plain computation. SLUICE_SOAK_OPERATIONS in the environment sets the number
 * of collectives, SLUICE_SOAK_SEED what they are. */
#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <memory>

#include "comm/inbox_size.h"
#include "comm_plan.h"
#include "comm_ranks.h"

namespace {

using namespace plan;

const int64_t timeout = 120000;
const unsigned operations_of_a_round = 100;

/* Memory with a mark behind its end. */
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes), memory_(bytes + sizeof mark_, 0x5a) {
    memcpy(memory_.data() + bytes, mark_, sizeof mark_);
  }
  char *data() { return memory_.data(); }
  void fill(const std::vector<char> &pattern) {
    for (size_t at = 0; at < bytes_; at += pattern.size())
      memcpy(data() + at, pattern.data(), std::min(pattern.size(), bytes_ - at));
  }
  bool holds(const std::vector<char> &pattern) const {
    bool same = memcmp(memory_.data() + bytes_, mark_, sizeof mark_) == 0;
    for (size_t at = 0; at < bytes_ && same; at += pattern.size())
      same = memcmp(memory_.data() + at, pattern.data(), std::min(pattern.size(), bytes_ - at)) == 0;
    return same;
  }

 private:
  static constexpr char mark_[] = "the end of the buffer";
  size_t bytes_;
  std::vector<char> memory_;
};

/* What one rank does of one operation. */
class Part {
 public:
  Part(const Operation &operation, sl_comm *comm, int rank, int size)
      : o_(operation), comm_(comm), rank_(rank), size_(size), width_(sl_dtype_size(operation.dtype)) {}

  bool run() {
    switch (o_.kind) {
      case BARRIER: return sl_comm_barrier(comm_, timeout) == SL_OK;
      case BROADCAST: return broadcast();
      case ALL_REDUCE:
      case REDUCE: return reduce();
      case REDUCE_SCATTER: return reduce_scatter();
      case ALL_GATHER: return gather(-1);
      case GATHER: return gather(o_.root);
      case SCATTER: return scatter();
      default: return all_to_all();
    }
  }

 private:
  std::vector<char> given(int from, int to) const {
    std::vector<char> pattern(period * width_);
    for (size_t i = 0; i < period; ++i) store(o_.dtype, &pattern[i * width_], value_of(o_, from, to, i));
    return pattern;
  }
  std::vector<char> sum(int to) const {
    std::vector<char> pattern(period * width_);
    for (size_t i = 0; i < period; ++i) store(o_.dtype, &pattern[i * width_], reduced(o_, size_, to, i));
    return pattern;
  }

  bool broadcast() {
    Buffer buffer(o_.count * width_);
    buffer.fill(given(rank_, 0));
    return sl_comm_broadcast(comm_, buffer.data(), o_.count * width_, o_.root, timeout) == SL_OK &&
           buffer.holds(given(o_.root, 0));
  }

  bool reduce() {
    Buffer in(o_.count * width_), apart(o_.count * width_), *out = o_.in_place ? &in : &apart;
    in.fill(given(rank_, 0));
    bool takes = o_.kind == ALL_REDUCE || rank_ == o_.root;
    sl_status status = o_.kind == ALL_REDUCE ? sl_comm_all_reduce(comm_, in.data(), out->data(), o_.count, o_.dtype,
                                                                  o_.op, o_.factor, timeout)
                                             : sl_comm_reduce(comm_, in.data(), takes ? out->data() : nullptr, o_.count,
                                                              o_.dtype, o_.op, o_.factor, o_.root, timeout);
    return status == SL_OK && (!takes || out->holds(sum(0))) && ((takes && o_.in_place) || in.holds(given(rank_, 0)));
  }

  /* Buffers, one a rank, of the parts that go from this rank, or come to it. */
  struct Parts {
    std::vector<Buffer> buffers;
    std::vector<void *> pointers;
    std::vector<size_t> counts, bytes;
    void add(size_t count, size_t width) {
      buffers.emplace_back(count * width);
      pointers.push_back(buffers.back().data());
      counts.push_back(count);
      bytes.push_back(count * width);
    }
    const void *const *inputs() const { return pointers.data(); }
  };

  bool reduce_scatter() {
    Parts in;
    for (int i = 0; i < size_; ++i) {
      in.add(part(o_, 0, i), width_);
      in.buffers[static_cast<size_t>(i)].fill(given(rank_, i));
    }
    Buffer out(part(o_, 0, rank_) * width_);
    return sl_comm_reduce_scatter(comm_, in.inputs(), in.counts.data(), out.data(), o_.dtype, o_.op, o_.factor,
                                  timeout) == SL_OK &&
           out.holds(sum(rank_));
  }

  bool gather(int root) {
    Buffer in(part(o_, rank_, 0) * width_);
    in.fill(given(rank_, 0));
    Parts out;
    for (int i = 0; i < size_; ++i) out.add(part(o_, i, 0), width_);
    bool takes = root < 0 || root == rank_;
    sl_status status = root < 0 ? sl_comm_all_gather(comm_, in.data(), out.bytes[static_cast<size_t>(rank_)],
                                                     out.pointers.data(), out.bytes.data(), timeout)
                                : sl_comm_gather(comm_, in.data(), out.bytes[static_cast<size_t>(rank_)],
                                                 takes ? out.pointers.data() : nullptr,
                                                 takes ? out.bytes.data() : nullptr, root, timeout);
    bool good = status == SL_OK;
    for (int i = 0; i < size_ && takes; ++i) good = good && out.buffers[static_cast<size_t>(i)].holds(given(i, 0));
    return good;
  }

  bool scatter() {
    Parts in;
    for (int i = 0; i < size_; ++i) {
      in.add(part(o_, 0, i), width_);
      in.buffers[static_cast<size_t>(i)].fill(given(rank_, i));
    }
    bool gives = rank_ == o_.root;
    Buffer out(part(o_, 0, rank_) * width_);
    return sl_comm_scatter(comm_, gives ? in.inputs() : nullptr, gives ? in.bytes.data() : nullptr, out.data(),
                           in.bytes[static_cast<size_t>(rank_)], o_.root, timeout) == SL_OK &&
           out.holds(given(o_.root, rank_));
  }

  bool all_to_all() {
    Parts in, out;
    for (int i = 0; i < size_; ++i) {
      in.add(part(o_, rank_, i), width_);
      in.buffers[static_cast<size_t>(i)].fill(given(rank_, i));
      out.add(part(o_, i, rank_), width_);
    }
    bool good = sl_comm_all_to_all(comm_, in.inputs(), in.bytes.data(), out.pointers.data(), out.bytes.data(),
                                   timeout) == SL_OK;
    for (int i = 0; i < size_; ++i) good = good && out.buffers[static_cast<size_t>(i)].holds(given(i, rank_));
    return good;
  }

  const Operation &o_;
  sl_comm *comm_;
  int rank_, size_;
  size_t width_;
};

struct Message {
  int from, to;
  uint64_t tag;
  size_t bytes;
  bool any; /* received from whoever it comes */
};

const uint64_t any_tag = 9;

std::vector<Message> random_messages(std::mt19937 &random, int size, unsigned count) {
  auto ranks = static_cast<unsigned>(size);
  std::vector<Message> result;
  for (unsigned i = 0; i < count; ++i) {
    int from = static_cast<int>(random() % ranks);
    int to = static_cast<int>((static_cast<unsigned>(from) + 1 + random() % (ranks - 1)) % ranks);
    bool any = random() % 8 == 0; /* these are small, so that no sender waits for its turn */
    size_t bytes = any ? 100 : random() % (random() % 4 ? 1000 : 4 * SL_INBOX_CONTENT);
    result.push_back({from, to, any ? any_tag : random() % 3, bytes, any});
  }
  return result;
}

std::vector<char> content(const Message &message, int from) {
  std::vector<char> result(period);
  for (size_t i = 0; i < period; ++i)
    result[i] = static_cast<char>(mix(static_cast<unsigned>(message.any ? 0 : message.bytes + message.tag),
                                      static_cast<unsigned>(from), static_cast<unsigned>(i)));
  return result;
}

/* This rank's ends of the messages, a few under way at a time, in their order. Returns what went wrong. */
std::string transfer(const std::vector<Message> &messages, sl_comm *comm, int rank) {
  struct Pending {
    const Message *message;
    std::unique_ptr<Buffer> buffer;
    sl_transfer *transfer;
  };
  std::deque<Pending> pending;
  auto finish = [&](size_t most) -> std::string {
    for (; pending.size() > most; pending.pop_front()) {
      Pending &oldest = pending.front();
      const Message &message = *oldest.message;
      if (sl_transfer_wait(oldest.transfer, timeout) != SL_OK) return sl_last_error();
      int peer = sl_transfer_peer(oldest.transfer);
      sl_transfer_free(oldest.transfer);
      if (message.to != rank) continue;
      if (!message.any && peer != message.from) return "a message came from rank " + std::to_string(peer);
      if (!oldest.buffer->holds(content(message, peer)))
        return "a message of " + std::to_string(message.bytes) + " bytes from rank " + std::to_string(peer) +
               " isn't what was sent";
    }
    return "";
  };
  for (const Message &message : messages) {
    if (message.from != rank && message.to != rank) continue;
    pending.push_back({&message, std::make_unique<Buffer>(message.bytes), nullptr});
    Pending &now = pending.back();
    sl_status status;
    if (message.from == rank) {
      now.buffer->fill(content(message, rank));
      status = sl_comm_send(comm, now.buffer->data(), message.bytes, message.to, message.tag, &now.transfer);
    } else {
      status = sl_comm_receive(comm, now.buffer->data(), message.bytes, message.any ? SL_COMM_ANY_RANK : message.from,
                               message.tag, &now.transfer);
    }
    if (status != SL_OK) return sl_last_error();
    std::string problem = finish(8);
    if (!problem.empty()) return problem;
  }
  return finish(0);
}

/* Some of the ranks, with memory of their own. */
struct Subset {
  std::vector<int> ranks;
  sl_comm *first = nullptr;
  std::string handle;

  Subset(std::mt19937 &random, int size) {
    for (int rank = 0; rank < size; ++rank)
      if (random() % 3) ranks.push_back(rank);
    if (ranks.empty()) ranks.push_back(0);
    first = ranks::create(static_cast<int>(ranks.size()), &handle);
  }
  int place(int rank) const {
    auto found = std::find(ranks.begin(), ranks.end(), rank);
    return found == ranks.end() ? -1 : static_cast<int>(found - ranks.begin());
  }
};

/* A round: a group, a part of it, and what both do. */
void run_round(unsigned seed, unsigned operations) {
  std::mt19937 random(seed);
  int size = 2 + static_cast<int>(random() % 7);
  size_t flat = 64u << random() % 8;
  size_t direct = random() % 2 ? SIZE_MAX : 1024u << random() % 8;
  size_t direct_send = random() % 2 ? SIZE_MAX : 1024u << random() % 8;
  sl_comm_tuning tuning = {flat, 16 << 10, direct, direct_send, 8u << 10 << random() % 4, 4u << 10 << random() % 4};
  if (random() % 4 == 0) setenv("SLUICE_COMM_READS", "0", 1);
  std::vector<Message> messages = random_messages(random, size, operations);
  Subset subset(random, size);
  std::atomic<bool> failed{false};
  auto body = [&](sl_comm *comm, int rank) {
    std::mt19937 same(seed + 1); /* the same on all ranks */
    int place = subset.place(rank), members = static_cast<int>(subset.ranks.size());
    sl_comm *part = place < 0 ? nullptr : place ? ranks::join(place, members, subset.handle) : subset.first;
    ASSERT_EQ(place < 0 ? SL_OK : sl_comm_start(part, timeout), SL_OK) << sl_last_error();
    auto beside = std::async(std::launch::async, [&] { return transfer(messages, comm, rank); });
    for (unsigned i = 0; i < operations && !failed; ++i) {
      bool apart = same() % 4 == 0;
      Operation operation = random_operation(same, apart ? members : size);
      if (apart && place < 0) continue;
      bool good = Part(operation, apart ? part : comm, apart ? place : rank, apart ? members : size).run();
      EXPECT_TRUE(good || failed.exchange(true))
          << "seed " << seed << ", " << size << " ranks, rank " << rank << (apart ? " in a part" : "") << ", operation "
          << i << ": " << operation.describe() << ": " << sl_last_error();
    }
    std::string problem = beside.get();
    EXPECT_TRUE(problem.empty() || failed) << "seed " << seed << ", rank " << rank << ": " << problem;
    sl_comm_close(part);
  };
  ranks::run_threads(size, body, 64 << 10, &tuning);
  unsetenv("SLUICE_COMM_READS");
}

unsigned number_from_environment(const char *name, unsigned otherwise) {
  const char *text = getenv(name);
  return text && *text ? static_cast<unsigned>(strtoul(text, nullptr, 10)) : otherwise;
}

TEST(CommSoak, RandomCollectivesAndTransfersOnRandomGroups) {
  unsigned operations = number_from_environment("SLUICE_SOAK_OPERATIONS", 600);
  unsigned seed = number_from_environment("SLUICE_SOAK_SEED", 1);
  for (unsigned done = 0; done < operations && !HasFailure(); done += operations_of_a_round) {
    if (done && done % 5000 == 0) printf("%u of %u operations\n", done, operations), fflush(stdout);
    run_round(seed * 1000003 + done, std::min(operations_of_a_round, operations - done));
  }
}

}  // namespace

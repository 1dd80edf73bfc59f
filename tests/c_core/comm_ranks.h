/* Ranks to test collectives with: threads of this process (which the thread sanitizer sees through), or processes
 * (which can be killed and stopped). */
#ifndef SLUICE_TESTS_COMM_RANKS_H
#define SLUICE_TESTS_COMM_RANKS_H

#include <gtest/gtest.h>
#include <signal.h>
#include <sluice/comm.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <future>
#include <string>
#include <thread>
#include <vector>

namespace ranks {

using Body = std::function<void(sl_comm *comm, int rank)>;

inline sl_comm *join(int rank, int size, const std::string &handle, size_t buffer_bytes = 0,
                     const sl_comm_tuning *tuning = nullptr) {
  (void)buffer_bytes, (void)tuning;
  sl_comm_options options = {rank, size, nullptr, 0, nullptr};
  sl_comm *comm = nullptr;
  return sl_comm_join(&options, handle.c_str(), &comm) == SL_OK ? comm : nullptr;
}

inline sl_comm *create(int size, std::string *handle, size_t buffer_bytes = 0, const sl_comm_tuning *tuning = nullptr) {
  sl_comm_options options = {0, size, nullptr, buffer_bytes, tuning};
  sl_comm *comm = nullptr;
  char text[SL_COMM_TEXT];
  if (sl_comm_create(&options, &comm, text) != SL_OK) return nullptr;
  *handle = text;
  return comm;
}

/* Runs body once a rank, in threads, between start and close. */
inline void run_threads(int size, const Body &body, size_t buffer_bytes = 0, const sl_comm_tuning *tuning = nullptr) {
  std::string handle;
  sl_comm *first = create(size, &handle, buffer_bytes, tuning);
  ASSERT_NE(first, nullptr) << sl_last_error();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      sl_comm *comm = rank ? join(rank, size, handle) : first;
      ASSERT_NE(comm, nullptr) << sl_last_error();
      ASSERT_EQ(sl_comm_start(comm, 20000), SL_OK) << sl_last_error();
      body(comm, rank);
      sl_comm_close(comm);
    });
  }
  for (auto &thread : threads) thread.join();
}

/* What a process that stood for a rank came to: the status it returned and the text of its error. */
struct Outcome {
  int process = 0;
  sl_status status = SL_INTERNAL;
  std::string text;
  double seconds = 0; /* from the start of body */
};

using Call = std::function<sl_status(sl_comm *comm, int rank)>;

/* Runs call once a rank, in processes; meddle gets their process numbers once all are in call. */
inline std::vector<Outcome> run_processes(int size, const Call &call,
                                          const std::function<void(const std::vector<int> &)> &meddle = nullptr,
                                          size_t buffer_bytes = 0, const sl_comm_tuning *tuning = nullptr) {
  std::string handle;
  struct Pipe {
    int read, write;
  };
  std::vector<Outcome> outcomes(size);
  std::vector<Pipe> results(size);
  int handles[2], ready[2];
  EXPECT_EQ(pipe(handles), 0);
  EXPECT_EQ(pipe(ready), 0);
  std::vector<int> processes(size);
  for (int rank = 0; rank < size; ++rank) {
    int ends[2];
    EXPECT_EQ(pipe(ends), 0);
    results[rank] = {ends[0], ends[1]};
    processes[rank] = fork();
    if (processes[rank] == 0) {
      /* Of its own: the kernel hangs up on a whole process group that is left with a stopped member. */
      setpgid(0, 0);
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      sl_comm *comm = nullptr;
      char text[SL_COMM_TEXT] = {0};
      if (rank == 0) {
        comm = create(size, &handle, buffer_bytes, tuning);
        snprintf(text, sizeof text, "%s", handle.c_str());
        for (int i = 1; i < size; ++i) (void)!write(handles[1], text, sizeof text);
      } else {
        (void)!read(handles[0], text, sizeof text);
        comm = join(rank, size, text);
      }
      sl_status status = comm ? sl_comm_start(comm, 20000) : SL_INTERNAL;
      (void)!write(ready[1], "x", 1);
      if (status == SL_OK) status = call(comm, rank);
      const char *error = status == SL_OK ? "" : sl_last_error();
      (void)!write(results[rank].write, &status, sizeof status);
      (void)!write(results[rank].write, error, strlen(error));
      _exit(0);
    }
    close(results[rank].write);
  }
  char byte;
  for (int rank = 0; rank < size; ++rank) EXPECT_EQ(read(ready[0], &byte, 1), 1);
  if (meddle) meddle(processes);
  auto begin = std::chrono::steady_clock::now();
  for (int rank = 0; rank < size; ++rank) {
    char text[1024];
    ssize_t got = read(results[rank].read, &outcomes[rank].status, sizeof(sl_status));
    if (got == sizeof(sl_status)) {
      while ((got = read(results[rank].read, text, sizeof text)) > 0) outcomes[rank].text.append(text, got);
    } else {
      outcomes[rank].status = SL_INTERNAL;
      outcomes[rank].text = "ended";
    }
    outcomes[rank].seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    outcomes[rank].process = processes[rank];
    close(results[rank].read);
  }
  for (int process : processes) {
    kill(process, SIGCONT);
    kill(process, SIGKILL);
    waitpid(process, nullptr, 0);
  }
  for (int end : {handles[0], handles[1], ready[0], ready[1]}) close(end);
  return outcomes;
}

}  // namespace ranks

#endif

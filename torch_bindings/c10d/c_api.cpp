// How Python makes a process group of this backend: by a few C functions, called through ctypes. Objects of c10d are
// handed over under a name in c10d's registry of groups, so that neither Python's nor pybind11's headers are needed,
// and one library serves every version of Python.
#include <torch/version.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <algorithm>
#include <cstdio>
#include <mutex>

#include "c10d/backend.h"
#include "c10d/statistics.h"
#include "c10d/tuning.h"

namespace sluice::c10d_backend {
namespace {

using ::c10d::ProcessGroup;

// Makes the backend of this kind for the group of this name, and registers it there as its custom backend. Returns 0,
// or writes why it can't.
using Factory = int (*)(const char *kind, const char *group, int64_t timeout_ms, char *error, size_t error_bytes);
std::atomic<Factory> factory{nullptr};

BackendPtr make_backend(const std::string &kind, const StorePtr &store, int rank, int size, Milliseconds timeout) {
  static std::atomic<uint64_t> number{0};
  std::string name = c10::str("sluice/", kind, "/", number++);
  auto group = c10::make_intrusive<ProcessGroup>(store, rank, size);
  ::c10d::register_process_group(name, group);
  char error[2048] = "no factory is set";
  Factory make = factory;
  bool failed = !make || make(kind.c_str(), name.c_str(), timeout.count(), error, sizeof(error)) != 0;
  ::c10d::unregister_process_group(name);
  if (failed) C10_THROW_ERROR(DistBackendError, c10::str("sluice: ", error));
  return group->getBackend(ProcessGroup::BackendType::CUSTOM);
}

}  // namespace
}  // namespace sluice::c10d_backend

extern "C" {

#define SLUICE_EXPORT __attribute__((visibility("default")))

// The torch this was compiled for.
SLUICE_EXPORT const char *sluice_c10d_torch_version() { return TORCH_VERSION; }

SLUICE_EXPORT void sluice_c10d_set_factory(sluice::c10d_backend::Factory make) { sluice::c10d_backend::factory = make; }

// How groups of so many ranks of one host choose, from now on; see sl_comm_tuning.
SLUICE_EXPORT void sluice_c10d_set_tuning(int size, size_t flat, size_t piece, size_t direct, size_t direct_send,
                                          size_t streaming, size_t buffer_streaming) {
  sluice::c10d_backend::set_tuning(size, {flat, piece, direct, direct_send, streaming, buffer_streaming});
}

// Back to the defaults.
SLUICE_EXPORT void sluice_c10d_clear_tunings() { sluice::c10d_backend::clear_tunings(); }

// Gives the group that is registered under this name in c10d a backend for CPU tensors. ranks: the global ranks of its
// members; none: their ranks in the group. Returns 0, or writes why it can't: 1 where the group's ranks could not get
// together, 2 where the store failed.
SLUICE_EXPORT int sluice_c10d_create(const char *registered_name, const char *group_name, int64_t timeout_ms,
                                     const int64_t *ranks, size_t rank_count, char *error, size_t error_bytes) {
  using namespace sluice::c10d_backend;
  try {
    auto group = ::c10d::resolve_process_group(registered_name);
    auto backend = c10::make_intrusive<ProcessGroupSluice>(ProcessGroupSluice::Arguments{group->getStore(),
                                                                                         group->getRank(),
                                                                                         group->getSize(),
                                                                                         Milliseconds(timeout_ms),
                                                                                         group_name,
                                                                                         {ranks, ranks + rank_count},
                                                                                         make_backend});
    group->setBackend(c10::DeviceType::CPU, ProcessGroup::BackendType::CUSTOM, backend);
    return 0;
  } catch (const c10::DistStoreError &failure) {
    std::snprintf(error, error_bytes, "%s", failure.what_without_backtrace());
    return 2;
  } catch (const c10::Error &failure) {
    std::snprintf(error, error_bytes, "%s", failure.what_without_backtrace());
  } catch (const std::exception &failure) {
    std::snprintf(error, error_bytes, "%s", failure.what());
  }
  return 1;
}

// Counters of the process, see c10d/statistics.h: collectives, their bytes, nanoseconds that they ran, nanoseconds of
// these that they were waited for, sends, their bytes.
SLUICE_EXPORT void sluice_c10d_read_statistics(uint64_t numbers[6]) {
  sluice::c10d_backend::Counters now = sluice::c10d_backend::Statistics::of_process().read();
  const uint64_t all[] = {now.collectives, now.bytes, now.busy_ns, now.waited_ns, now.sends, now.sent_bytes};
  std::copy(std::begin(all), std::end(all), numbers);
}

// For collectives that a thread of somebody else's runs in the background, in rows: the thread says that it is one; who
// starts a row says so, and if that returns 1 its end is to be told.
SLUICE_EXPORT void sluice_c10d_set_background_thread() {
  sluice::c10d_backend::Statistics::set_background_thread(true);
}
SLUICE_EXPORT int sluice_c10d_launch() { return sluice::c10d_backend::Statistics::of_process().launch(); }
SLUICE_EXPORT void sluice_c10d_land() { sluice::c10d_backend::Statistics::of_process().land(); }

}  // extern "C"

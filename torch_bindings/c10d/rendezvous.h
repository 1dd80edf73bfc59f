// Which ranks of a group share a host, and the shared memory between those that do.
#pragma once

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <vector>

#include "c10d/communicator.h"
#include "c10d/errors.h"

namespace sluice::c10d_backend {

using StorePtr = c10::intrusive_ptr<::c10d::Store>;

struct Member {
  int rank, size;
  std::vector<int> names;  // how errors call the ranks
};

struct Hosts {
  std::vector<std::vector<int>> ranks;  // of each host, in order; all ranks of the group see the same here
  int host;                             // the one this rank is on
  CommunicatorPtr communicator;         // between its ranks, started
};

// Keys for one more group in a store that may hold those of earlier ones: c10d gives a name again after its group was
// destroyed, and splits a group once for each kind of device, every time with the same store. All ranks of the group
// call this once for each group that they make.
StorePtr begin_generation(const StorePtr &store, const Member &member);

// Called by all ranks of the group. Throws on all of them alike, or with the timeout of the store.
Hosts find_hosts(::c10d::Store &store, const Member &member, Milliseconds timeout);

}  // namespace sluice::c10d_backend

// One rank's end of a group of the C core, closed when the last user lets go of it.
#pragma once

#include <unistd.h>

#include <memory>

#include <sluice/comm.h>

namespace sluice::c10d_backend {

class Communicator {
 public:
  explicit Communicator(sl_comm *comm) : comm_(comm), process_(getpid()) {}
  // A forked child has a copy of this object, but is no rank of the group.
  ~Communicator() {
    if (getpid() == process_) sl_comm_close(comm_);
  }
  Communicator(const Communicator &) = delete;
  Communicator &operator=(const Communicator &) = delete;

  sl_comm *get() const { return comm_; }
  bool belongs_to_this_process() const { return getpid() == process_; }

 private:
  sl_comm *comm_;
  const pid_t process_;
};

using CommunicatorPtr = std::shared_ptr<Communicator>;

}  // namespace sluice::c10d_backend

// The table of tunings; one for the process.
#include "c10d/tuning.h"

#include <map>
#include <mutex>

namespace sluice::c10d_backend {
namespace {

struct Table {
  std::mutex mutex;
  std::map<int, sl_comm_tuning> tunings;
};

Table &table() {
  static Table only;
  return only;
}

}  // namespace

void set_tuning(int size, const sl_comm_tuning &tuning) {
  std::lock_guard<std::mutex> guard(table().mutex);
  table().tunings[size] = tuning;
}

void clear_tunings() {
  std::lock_guard<std::mutex> guard(table().mutex);
  table().tunings.clear();
}

std::optional<sl_comm_tuning> find_tuning(int size) {
  std::lock_guard<std::mutex> guard(table().mutex);
  auto found = table().tunings.find(size);
  if (found == table().tunings.end()) return std::nullopt;
  return found->second;
}

}  // namespace sluice::c10d_backend

// Which algorithm serves which size, as measured on this machine for groups of a size: what Python has read from the
// file of `torch-sluice tune-comm`. Groups of other sizes use the C core's defaults.
#pragma once

#include <optional>

#include <sluice/comm.h>

namespace sluice::c10d_backend {

void set_tuning(int size, const sl_comm_tuning &tuning);
void clear_tunings();

// For a group of so many ranks of one host, made from now on.
std::optional<sl_comm_tuning> find_tuning(int size);

}  // namespace sluice::c10d_backend

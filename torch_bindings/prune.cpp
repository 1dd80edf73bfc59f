// Shim of prune: hand a weight's memory to C as it lies there, allocate the norms.
#include <sluice/prune.h>

#include "operator.h"

namespace sluice {
namespace {

Tensor channel_norms(Tensor weight, int64_t dim) {
  if (weight.dim() < 1 || weight.dim() > SL_PRUNE_MAX_RANK) {
    fail("weight is " + describe(weight) + ", expected a rank of 1 to " + std::to_string(SL_PRUNE_MAX_RANK));
  }
  if (dim < -weight.dim() || dim >= weight.dim()) {
    fail("dim is " + std::to_string(dim) + ", expected " + std::to_string(-weight.dim()) + " to " +
         std::to_string(weight.dim() - 1) + " for a weight that is " + describe(weight));
  }
  sl_channel_norms_args args{};
  args.dtype = dtype_of(weight, "weight");
  args.weight = weight.const_data_ptr();
  args.rank = weight.dim();
  args.dim = dim < 0 ? dim + weight.dim() : dim;
  for (int64_t i = 0; i < weight.dim(); ++i) args.sizes[i] = weight.size(i), args.strides[i] = weight.stride(i);
  ScalarType dtype = args.dtype == SL_F64 ? ScalarType::Double : ScalarType::Float;
  Tensor norms = empty({weight.size(args.dim)}, dtype, weight);
  sl_executor executor = torch_executor();
  args.norms = norms.mutable_data_ptr(), args.executor = &executor;
  check_status(sl_channel_norms(&args));
  return norms;
}

}  // namespace
}  // namespace sluice

STABLE_TORCH_LIBRARY_IMPL(sluice, CPU, library) { SLUICE_IMPLEMENT(SL_CHANNEL_NORMS_SCHEMA, sluice::channel_norms); }

SLUICE_ELSEWHERE(library) { SLUICE_REFUSE(SL_CHANNEL_NORMS_SCHEMA, sluice::channel_norms, false); }

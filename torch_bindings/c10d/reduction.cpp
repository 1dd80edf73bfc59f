// dtypes and reduction operators of the C core for those of torch.
#include "c10d/reduction.h"

#include <ATen/ops/view_as_real.h>

namespace sluice::c10d_backend {
namespace {

using ::c10d::ReduceOp;

const char *name_of(ReduceOp::RedOpType op) {
  static const char *const names[] = {"SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM"};
  return op < sizeof(names) / sizeof(names[0]) ? names[op] : "UNUSED";
}

double factor_of(const ReduceOp &op) {
  auto *supplement = dynamic_cast<::c10d::NCCLPreMulSumSupplement *>(op.supplement_.get());
  TORCH_CHECK(supplement, "sluice: PREMUL_SUM without its factor");
  const at::Tensor &tensor = supplement->tensor_factor;
  return tensor.defined() ? tensor.item<double>() : supplement->double_factor;
}

}  // namespace

std::optional<sl_dtype> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return SL_F32;
    case at::kDouble: return SL_F64;
    case at::kBFloat16: return SL_BF16;
    case at::kHalf: return SL_F16;
    case at::kChar: return SL_I8;
    case at::kByte: return SL_U8;
    case at::kShort: return SL_I16;
    case at::kInt: return SL_I32;
    case at::kLong: return SL_I64;
    case at::kBool: return SL_BOOL;
    default: return std::nullopt;
  }
}

at::Tensor real_view(const at::Tensor &tensor) { return tensor.is_complex() ? at::view_as_real(tensor) : tensor; }

Reduction make_reduction(const char *call, const at::Tensor &tensor, const ReduceOp &op) {
  std::optional<sl_dtype> dtype = dtype_of(c10::toRealValueType(tensor.scalar_type()));
  TORCH_CHECK(dtype, "sluice: ", call, " of ", tensor.scalar_type(),
              ", expected a floating-point, complex, integer or boolean dtype that torch computes with");
  bool floating = tensor.is_floating_point() || tensor.is_complex(), boolean = *dtype == SL_BOOL;
  switch (op.op_) {
    case ReduceOp::SUM: break;
    case ReduceOp::AVG:
      TORCH_CHECK(!boolean, "sluice: ", call, " of Bool with AVG, expected numbers for this operator");
      break;
    case ReduceOp::PRODUCT:
    case ReduceOp::MIN:
    case ReduceOp::MAX:
      TORCH_CHECK(!tensor.is_complex(), "sluice: ", call, " of ", tensor.scalar_type(), " with ", name_of(op.op_),
                  ", expected SUM, AVG or PREMUL_SUM");
      break;
    case ReduceOp::BAND:
    case ReduceOp::BOR:
    case ReduceOp::BXOR:
      TORCH_CHECK(!floating, "sluice: ", call, " of ", tensor.scalar_type(), " with ", name_of(op.op_),
                  ", expected an integer or boolean dtype");
      break;
    case ReduceOp::PREMUL_SUM:
      TORCH_CHECK(floating, "sluice: ", call, " of ", tensor.scalar_type(),
                  " with PREMUL_SUM, expected a floating-point dtype");
      break;
    default:
      TORCH_CHECK(false, "sluice: ", call, " with operator ", int(op.op_),
                  ", expected one of torch.distributed.ReduceOp");
  }
  // The numbers of the operators are those of c10d.
  static_assert(int(SL_REDUCE_AVG) == int(ReduceOp::AVG) && int(SL_REDUCE_MAX) == int(ReduceOp::MAX) &&
                int(SL_REDUCE_BXOR) == int(ReduceOp::BXOR) && int(SL_REDUCE_PREMUL_SUM) == int(ReduceOp::PREMUL_SUM));
  double factor = op.op_ == ReduceOp::PREMUL_SUM ? factor_of(op) : 1;
  return {*dtype, static_cast<sl_reduce_op>(op.op_), factor};
}

}  // namespace sluice::c10d_backend

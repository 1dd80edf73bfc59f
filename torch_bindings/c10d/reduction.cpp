// dtypes and reduction operators of the C core for those of torch.
#include "c10d/reduction.h"

#include <optional>

namespace sluice::c10d_backend {
namespace {

using ::c10d::ReduceOp;

std::optional<sl_dtype> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
    case at::kComplexFloat: return SL_F32;
    case at::kDouble:
    case at::kComplexDouble: return SL_F64;
    case at::kBFloat16: return SL_BF16;
    case at::kHalf:
    case at::kComplexHalf: return SL_F16;
    case at::kChar: return SL_I8;
    case at::kByte: return SL_U8;
    case at::kShort: return SL_I16;
    case at::kInt: return SL_I32;
    case at::kLong: return SL_I64;
    case at::kBool: return SL_BOOL;
    default: return std::nullopt;
  }
}

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

Reduction make_reduction(const char *call, const at::Tensor &tensor, const ReduceOp &op) {
  std::optional<sl_dtype> dtype = dtype_of(tensor.scalar_type());
  TORCH_CHECK(dtype, "sluice: ", call, " of ", tensor.scalar_type(),
              ", expected a floating-point, complex, integer or boolean dtype that torch computes with");
  TORCH_CHECK(op.op_ <= ReduceOp::PREMUL_SUM, "sluice: ", call, " with operator ", int(op.op_),
              ", expected one of torch.distributed.ReduceOp");
  bool complex = tensor.is_complex();
  bool linear = op.op_ == ReduceOp::SUM || op.op_ == ReduceOp::AVG || op.op_ == ReduceOp::PREMUL_SUM;
  TORCH_CHECK(!complex || linear, "sluice: ", call, " of ", tensor.scalar_type(), " with ", name_of(op.op_),
              ", expected SUM, AVG or PREMUL_SUM");
  bool bitwise = op.op_ == ReduceOp::BAND || op.op_ == ReduceOp::BOR || op.op_ == ReduceOp::BXOR;
  TORCH_CHECK(!bitwise || !(tensor.is_floating_point() || complex), "sluice: ", call, " of ", tensor.scalar_type(),
              " with ", name_of(op.op_), ", expected an integer or boolean dtype");
  // The numbers of the operators are those of c10d.
  static_assert(int(SL_REDUCE_AVG) == ReduceOp::AVG && int(SL_REDUCE_PREMUL_SUM) == ReduceOp::PREMUL_SUM &&
                int(SL_REDUCE_MIN) == ReduceOp::MIN && int(SL_REDUCE_BXOR) == ReduceOp::BXOR);
  double factor = op.op_ == ReduceOp::PREMUL_SUM ? factor_of(op) : 1;
  return {*dtype, static_cast<sl_reduce_op>(op.op_), factor, complex ? size_t{2} : size_t{1}};
}

}  // namespace sluice::c10d_backend

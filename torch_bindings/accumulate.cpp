// Shim of accumulate: check shapes, dtypes and memory layout, allocate the statistics, call C.
#include "accumulate.h"

#include <sluice/accumulate.h>
#include <sluice/cuda.h>

#include <algorithm>

#include "cuda.h"
#include "operator.h"

namespace sluice {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Dimensions of size 1 have strides that mean nothing.
bool same_layout(const Tensor &left, const Tensor &right) {
  for (int64_t i = 0; i < left.dim(); ++i) {
    if (left.size(i) > 1 && left.stride(i) != right.stride(i)) return false;
  }
  return true;
}

// No gaps and no overlaps: in the order of the strides, each is the product of the sizes before it.
bool fills_memory(const Tensor &tensor) {
  if (tensor.numel() == 0) return true;
  std::vector<int64_t> order;
  for (int64_t i = 0; i < tensor.dim(); ++i) order.push_back(i);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return std::make_pair(tensor.stride(i), tensor.size(i)) < std::make_pair(tensor.stride(j), tensor.size(j));
  });
  int64_t expected = 1;
  for (int64_t i : order) {
    if (tensor.size(i) == 1) continue;
    if (tensor.stride(i) != expected) return false;
    expected *= tensor.size(i);
  }
  return true;
}

void check_device(const char *name, const Tensor &tensor, const Tensor &like) {
  if (tensor.is_cpu() != like.is_cpu() || tensor.get_device_index() != like.get_device_index()) {
    fail(std::string(name) + " is " + describe(tensor) + ", expected the device of the accumulator, which is " +
         describe(like));
  }
}

void check_values(const char *name, const Tensor &tensor) {
  ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    fail(std::string(name) + " is " + describe(tensor) + ", expected float32, bfloat16 or float16");
  }
}

void check_shape(const char *name, const Tensor &tensor, const Tensor &accumulator) {
  bool same = tensor.dim() == accumulator.dim();
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == accumulator.size(i);
  if (!same) {
    fail(std::string(name) + " is " + describe(tensor) + ", expected the shape of the accumulator, which is " +
         describe(accumulator));
  }
}

void check_accumulator(const Tensor &accumulator, const OptionalTensor &exponents) {
  ScalarType dtype = accumulator.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Half) {
    fail("accumulator is " + describe(accumulator) + ", expected float32 or float16");
  }
  if (!fills_memory(accumulator)) {
    fail("accumulator is " + describe(accumulator) +
         " with gaps or overlaps in its memory, expected strides that fill it, as torch.empty_like gives");
  }
  if ((dtype == ScalarType::Half) != exponents.has_value()) {
    fail(exponents ? "exponents are given with a float32 accumulator, expected None: only float16 is scaled"
                   : "exponents is None, expected int8 exponents with a float16 accumulator");
  }
  if (!exponents) return;
  int64_t blocks = (accumulator.numel() + SL_ACCUMULATE_BLOCK - 1) / SL_ACCUMULATE_BLOCK;
  if (exponents->scalar_type() != ScalarType::Char || exponents->dim() != 1 || exponents->size(0) != blocks ||
      !exponents->is_contiguous()) {
    fail("exponents is " + describe(*exponents) + ", expected contiguous int8 [ceil(numel / " +
         std::to_string(SL_ACCUMULATE_BLOCK) + ")] = [" + std::to_string(blocks) + "]");
  }
  check_device("exponents", *exponents, accumulator);
}

Tensor empty_in_layout_of(const Tensor &accumulator, ScalarType dtype) {
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < accumulator.dim(); ++i) {
    sizes.push_back(accumulator.size(i));
    strides.push_back(accumulator.stride(i));
  }
  return empty_strided(sizes, strides, dtype, accumulator);
}

// Writes to a tensor as a kernel does: autograd and the version counter do not see it.
void copy_memory(const Tensor &target, const Tensor &source) {
  AtenTensorHandle alias = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(target.get(), target.dim(), target.sizes().data(),
                                                        target.strides().data(), 0, &alias));
  Tensor memory(alias);
  torch::stable::copy_(memory, source);
}

Tensor in_layout_of(const Tensor &accumulator, const Tensor &grad) {
  if (same_layout(grad, accumulator)) return grad;
  Tensor copy = empty_in_layout_of(accumulator, grad.scalar_type());
  torch::stable::copy_(copy, grad);
  return copy;
}

sl_accumulate_args make_args(const Tensor &accumulator, const OptionalTensor &exponents) {
  sl_accumulate_args args{};
  args.count = accumulator.numel();
  args.dtype = dtype_of(accumulator, "accumulator");
  args.accumulator = const_cast<void *>(accumulator.const_data_ptr());
  if (exponents) {
    args.exponents = static_cast<decltype(args.exponents)>(const_cast<void *>(exponents->const_data_ptr()));
  }
  return args;
}

// One C function on each kind of device.
struct Operation {
  sl_status (*on_cpu)(const sl_accumulate_args *);
  sl_status (*on_cuda)(const sl_accumulate_args *, void *);
};

Tensor run(Operation operation, sl_accumulate_args args, const Tensor &like) {
  size_t bytes = 0;
  check_status(like.is_cpu() ? sl_accumulate_workspace_size(args.count, &bytes)
                             : sl_accumulate_cuda_workspace_size(args.count, &bytes));
  Tensor stats = empty({SL_ACCUMULATE_STATS}, ScalarType::Double, like);
  Tensor workspace = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, like);
  args.stats = static_cast<sl_accumulate_stats *>(stats.mutable_data_ptr());
  args.workspace = workspace.mutable_data_ptr(), args.workspace_size = bytes;
  if (like.is_cpu()) {
    sl_executor executor = torch_executor();
    args.executor = &executor;
    check_status(operation.on_cpu(&args));
  } else {
    CudaScope cuda(like);
    check_status(operation.on_cuda(&args, cuda.stream()));
  }
  return stats;
}

}  // namespace

Tensor accumulate_(Tensor accumulator, OptionalTensor exponents, Tensor grad, double grad_scale, bool overwrite,
                   std::optional<int64_t> seed) {
  check_accumulator(accumulator, exponents);
  check_values("grad", grad);
  check_shape("grad", grad, accumulator);
  check_device("grad", grad, accumulator);
  Tensor dense = in_layout_of(accumulator, grad);
  sl_accumulate_args args = make_args(accumulator, exponents);
  args.grad = dense.const_data_ptr();
  args.grad_dtype = dtype_of(grad, "grad");
  args.grad_scale = grad_scale, args.overwrite = overwrite;
  args.stochastic = seed.has_value(), args.seed = static_cast<uint64_t>(seed.value_or(0));
  return run({sl_accumulate, sl_accumulate_cuda}, args, accumulator);
}

Tensor measure_gradient(Tensor grad) {
  check_values("grad", grad);
  Tensor dense = fills_memory(grad) ? grad : torch::stable::contiguous(grad);
  sl_accumulate_args args{};
  args.count = grad.numel();
  args.grad = dense.const_data_ptr();
  args.grad_dtype = dtype_of(grad, "grad");
  return run({sl_measure_gradient, sl_measure_gradient_cuda}, args, grad);
}

Tensor read_accumulator(Tensor accumulator, OptionalTensor exponents, double scale, Tensor out) {
  check_accumulator(accumulator, exponents);
  check_values("out", out);
  check_shape("out", out, accumulator);
  check_device("out", out, accumulator);
  bool direct = same_layout(out, accumulator);
  Tensor dense = direct ? out : empty_in_layout_of(accumulator, out.scalar_type());
  sl_accumulate_args args = make_args(accumulator, exponents);
  args.scale = scale;
  args.out = dense.mutable_data_ptr();
  args.out_dtype = dtype_of(out, "out");
  Tensor stats = run({sl_read_accumulator, sl_read_accumulator_cuda}, args, accumulator);
  if (!direct) copy_memory(out, dense);
  return stats;
}

}  // namespace sluice

STABLE_TORCH_LIBRARY_IMPL(sluice, CPU, library) {
  SLUICE_IMPLEMENT(SL_ACCUMULATE_SCHEMA, sluice::accumulate_);
  SLUICE_IMPLEMENT(SL_MEASURE_GRADIENT_SCHEMA, sluice::measure_gradient);
  SLUICE_IMPLEMENT(SL_READ_ACCUMULATOR_SCHEMA, sluice::read_accumulator);
}

SLUICE_ELSEWHERE(library) {
  SLUICE_REFUSE(SL_ACCUMULATE_SCHEMA, sluice::accumulate_, true);
  SLUICE_REFUSE(SL_MEASURE_GRADIENT_SCHEMA, sluice::measure_gradient, true);
  SLUICE_REFUSE(SL_READ_ACCUMULATOR_SCHEMA, sluice::read_accumulator, true);
}

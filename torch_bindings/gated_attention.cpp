// Shim of gated_attention: check shapes and dtypes, allocate, call C.
#include "gated_attention.h"

#include <sluice/cuda.h>
#include <sluice/gated_attention.h>

#include "attention_tensors.h"
#include "cuda.h"
#include "operator.h"

namespace sluice {
namespace {

void check_input(const char *name, const Tensor &tensor, const std::vector<int64_t> &shape, ScalarType dtype,
                 const char *shape_names, const Tensor &like) {
  check_attention_tensor(name, tensor, shape, dtype,
                         std::string(shape_names) + " = " + shape_text(shape) +
                             " of the same dtype as its peers (q, k, v alike; a, b, logit_tau, lse and dlse float32, "
                             "or float64 with float64 inputs; key_range, q_offset and text_begin int64)",
                         like);
}

// Tensors that the args point into must outlive the call, hence the copies here.
struct Inputs {
  Tensor q, k, v, a, b;
  OptionalTensor logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes, output_gate, dropout_seed;
  sl_executor executor;
  sl_gated_attention_args args{};
  ScalarType dtype, gate_dtype;
};

Inputs check_inputs(const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &a, const Tensor &b,
                    const OptionalTensor &logit_tau, const OptionalTensor &key_range, const OptionalTensor &q_offset,
                    const OptionalTensor &text_begin, const OptionalTensor &attn_mask,
                    const OptionalTensor &alibi_slopes, const OptionalTensor &output_gate,
                    const OptionalTensor &dropout_seed, bool causal, int64_t window, int64_t sinks,
                    int64_t sliding_window, double softcap, double dropout_p, double scale) {
  if (q.dim() != 4) fail("q is " + describe(q) + ", expected [batch, heads_q, n_q, head_dim]");
  if (k.dim() != 4) fail("k is " + describe(k) + ", expected [batch, heads_kv, n_k, head_dim]");
  if (v.dim() != 4) fail("v is " + describe(v) + ", expected [batch, heads_kv, n_k, head_dim_v]");
  int64_t B = q.size(0), Hq = q.size(1), Nq = q.size(2), D = q.size(3);
  int64_t Hkv = k.size(1), Nk = k.size(2), Dv = v.size(3);
  ScalarType dtype = q.scalar_type();
  ScalarType gate_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  sl_dtype c_dtype = dtype_of(q, "q");
  check_input("k", k, {B, Hkv, Nk, D}, dtype, "[batch, heads_kv, n_k, head_dim]", q);
  check_input("v", v, {B, Hkv, Nk, Dv}, dtype, "[batch, heads_kv, n_k, head_dim_v]", q);
  check_input("a", a, {B, Hq, Nq}, gate_dtype, "[batch, heads_q, n_q]", q);
  check_input("b", b, {B, Hkv, Nk}, gate_dtype, "[batch, heads_kv, n_k]", q);
  if (logit_tau) check_input("logit_tau", *logit_tau, {B, Hq}, gate_dtype, "[batch, heads_q]", q);
  if (key_range) check_input("key_range", *key_range, {B, 2}, ScalarType::Long, "[batch, 2]", q);
  if (q_offset) check_input("q_offset", *q_offset, {B}, ScalarType::Long, "[batch]", q);
  if (text_begin) check_input("text_begin", *text_begin, {B}, ScalarType::Long, "[batch]", q);
  if (attn_mask) check_mask(*attn_mask, {B, Hq, Nq, Nk}, q);
  if (alibi_slopes) check_input("alibi_slopes", *alibi_slopes, {B, Hq}, gate_dtype, "[batch, heads_q]", q);
  int64_t gate_channels = 0;
  if (output_gate) {
    gate_channels = output_gate->dim() == 4 && output_gate->size(3) == 1 ? 1 : Dv;
    check_input("output_gate", *output_gate, {B, Hq, Nq, gate_channels}, dtype,
                "[batch, heads_q, n_q, 1 or head_dim_v]", q);
  }
  if (dropout_seed) check_input("dropout_seed", *dropout_seed, {1}, ScalarType::Long, "[1]", q);

  sl_gated_attention_args sizes{};
  sizes.dtype = c_dtype;
  sizes.batch = B, sizes.heads_q = Hq, sizes.heads_kv = Hkv, sizes.n_q = Nq, sizes.n_k = Nk;
  sizes.head_dim = D, sizes.head_dim_v = Dv;
  sizes.causal = causal, sizes.window = window, sizes.sinks = sinks, sizes.scale = scale;
  sizes.sliding_window = sliding_window, sizes.softcap = softcap, sizes.dropout_p = dropout_p;
  // Checks the numbers before anything is copied: an expanded tensor can be larger than memory.
  size_t workspace_bytes = 0;
  check_status(sl_gated_attention_workspace_size(&sizes, &workspace_bytes));

  Inputs in{with_dense_rows(q),
            with_dense_rows(k),
            with_dense_rows(v),
            a,
            b,
            logit_tau,
            key_range,
            q_offset,
            text_begin,
            attn_mask,
            alibi_slopes,
            output_gate,
            dropout_seed,
            torch_executor(),
            sizes,
            dtype,
            gate_dtype};
  if (output_gate) in.output_gate = with_dense_rows(*output_gate);
  for (OptionalTensor *tensor : {&in.logit_tau, &in.key_range, &in.q_offset, &in.text_begin, &in.alibi_slopes}) {
    if (*tensor) *tensor = torch::stable::contiguous(**tensor);
  }
  sl_gated_attention_args &args = in.args;
  args.q = view4(in.q), args.k = view4(in.k), args.v = view4(in.v);
  args.a = view3(in.a), args.b = view3(in.b);
  args.logit_tau = in.logit_tau ? in.logit_tau->const_data_ptr() : nullptr;
  args.key_range = integers_of(in.key_range);
  args.q_offset = integers_of(in.q_offset), args.text_begin = integers_of(in.text_begin);
  if (in.output_gate) args.output_gate = view4(*in.output_gate);
  args.output_gate_channels = gate_channels;
  args.dropout_seed = integers_of(in.dropout_seed);
  args.alibi_slopes = in.alibi_slopes ? in.alibi_slopes->const_data_ptr() : nullptr;
  args.attn_mask = view_mask(in.attn_mask);
  return in;
}

// The kernels of the device that the tensors are on.
sl_status measure_backward_workspace(const sl_gated_attention_args &args, const Tensor &q, size_t *bytes) {
  return q.is_cpu() ? sl_gated_attention_backward_workspace_size(&args, bytes)
                    : sl_gated_attention_backward_cuda_workspace_size(&args, bytes);
}

sl_status run_forward(const sl_gated_attention_args &args, const Tensor &q) {
  if (q.is_cpu()) return sl_gated_attention(&args);
  CudaScope cuda(q);
  return sl_gated_attention_cuda(&args, cuda.stream());
}

sl_status run_backward(const sl_gated_attention_args &args, const Tensor &q) {
  if (q.is_cpu()) return sl_gated_attention_backward(&args);
  CudaScope cuda(q);
  return sl_gated_attention_backward_cuda(&args, cuda.stream());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gated_attention(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b,
                                                   OptionalTensor logit_tau, OptionalTensor key_range,
                                                   OptionalTensor q_offset, OptionalTensor text_begin,
                                                   OptionalTensor attn_mask, OptionalTensor alibi_slopes,
                                                   OptionalTensor output_gate, OptionalTensor dropout_seed, bool causal,
                                                   int64_t window, int64_t sinks, int64_t sliding_window,
                                                   double softcap, double dropout_p, double scale) {
  Inputs in = check_inputs(q, k, v, a, b, logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes,
                           output_gate, dropout_seed, causal, window, sinks, sliding_window, softcap, dropout_p, scale);
  sl_gated_attention_args &args = in.args;
  args.executor = &in.executor;
  size_t bytes = 0;
  if (q.is_cpu()) check_status(sl_gated_attention_workspace_size(&args, &bytes));
  Tensor out = empty({args.batch, args.heads_q, args.n_q, args.head_dim_v}, in.dtype, q);
  Tensor lse = empty({args.batch, args.heads_q, args.n_q}, in.gate_dtype, q);
  Tensor kept = empty({args.batch, args.heads_q, args.n_q}, ScalarType::Int, q);
  Tensor workspace = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, q);
  args.out = view4(out), args.lse = view3(lse), args.kept = kept.mutable_data_ptr();
  args.workspace = workspace.mutable_data_ptr(), args.workspace_size = bytes;
  check_status(run_forward(args, q));
  return {out, lse, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_attention_backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, OptionalTensor logit_tau,
    OptionalTensor key_range, OptionalTensor q_offset, OptionalTensor text_begin, OptionalTensor attn_mask,
    OptionalTensor alibi_slopes, OptionalTensor output_gate, OptionalTensor dropout_seed, Tensor out, Tensor lse,
    bool causal, int64_t window, int64_t sinks, int64_t sliding_window, double softcap, double dropout_p, double scale,
    bool mask_gradient) {
  Inputs in = check_inputs(q, k, v, a, b, logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes,
                           output_gate, dropout_seed, causal, window, sinks, sliding_window, softcap, dropout_p, scale);
  if (mask_gradient && (!attn_mask || attn_mask->scalar_type() == ScalarType::Bool)) {
    fail("mask_gradient is true, expected false without an attn_mask of numbers");
  }
  sl_gated_attention_args &args = in.args;
  args.executor = &in.executor;
  std::vector<int64_t> out_shape = {args.batch, args.heads_q, args.n_q, args.head_dim_v};
  check_input("dout", dout, out_shape, in.dtype, "[batch, heads_q, n_q, head_dim_v]", q);
  check_input("out", out, out_shape, in.dtype, "[batch, heads_q, n_q, head_dim_v]", q);
  for (const auto &[name, tensor] : {std::pair<const char *, OptionalTensor>{"lse", lse}, {"dlse", dlse}}) {
    if (!tensor) continue;
    check_input(name, *tensor, {args.batch, args.heads_q, args.n_q}, in.gate_dtype, "[batch, heads_q, n_q]", q);
  }
  Tensor dout_rows = with_dense_rows(dout), out_rows = with_dense_rows(out);
  std::vector<int64_t> mask_shape = {0};
  if (mask_gradient) {
    mask_shape = {attn_mask->size(0), attn_mask->size(1), attn_mask->size(2), attn_mask->size(3)};
  }
  Tensor dattn_mask = empty(mask_shape, in.gate_dtype, q);
  if (dattn_mask.numel()) args.dattn_mask = view_mask(dattn_mask, in.dtype == ScalarType::Double ? SL_F64 : SL_F32);
  size_t bytes = 0;
  check_status(measure_backward_workspace(args, q, &bytes));
  Tensor dq = empty({args.batch, args.heads_q, args.n_q, args.head_dim}, in.dtype, q);
  Tensor dk = empty({args.batch, args.heads_kv, args.n_k, args.head_dim}, in.dtype, q);
  Tensor dv = empty({args.batch, args.heads_kv, args.n_k, args.head_dim_v}, in.dtype, q);
  Tensor da = empty({args.batch, args.heads_q, args.n_q}, in.gate_dtype, q);
  Tensor db = empty({args.batch, args.heads_kv, args.n_k}, in.gate_dtype, q);
  std::vector<int64_t> gate_shape = {0};
  if (in.output_gate) gate_shape = {args.batch, args.heads_q, args.n_q, args.output_gate_channels};
  Tensor doutput_gate = empty(gate_shape, in.dtype, q);
  if (in.output_gate) args.doutput_gate = view4(doutput_gate);
  Tensor workspace = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, q);
  args.dout = view4(dout_rows), args.out = view4(out_rows), args.lse = view3(lse);
  if (dlse) args.dlse = view3(*dlse);
  args.dq = view4(dq), args.dk = view4(dk), args.dv = view4(dv), args.da = view3(da), args.db = view3(db);
  args.workspace = workspace.mutable_data_ptr(), args.workspace_size = bytes;
  check_status(run_backward(args, q));
  return {dq, dk, dv, da, db, dattn_mask, doutput_gate};
}

}  // namespace sluice

STABLE_TORCH_LIBRARY_IMPL(sluice, CPU, library) {
  SLUICE_IMPLEMENT(SL_GATED_ATTENTION_SCHEMA, sluice::gated_attention);
  SLUICE_IMPLEMENT(SL_GATED_ATTENTION_BACKWARD_SCHEMA, sluice::gated_attention_backward);
}

SLUICE_ELSEWHERE(library) {
  SLUICE_REFUSE(SL_GATED_ATTENTION_SCHEMA, sluice::gated_attention, true);
  SLUICE_REFUSE(SL_GATED_ATTENTION_BACKWARD_SCHEMA, sluice::gated_attention_backward, true);
}

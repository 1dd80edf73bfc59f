// Shim of gated_attention_paged: check shapes and dtypes, allocate, call C.
#include <sluice/gated_attention.h>

#include "attention_tensors.h"
#include "operator.h"

namespace sluice {
namespace {

// Sizes that the other tensors have to agree on.
struct Sizes {
  int64_t batch, heads_q, n_q, head_dim, blocks, block_size, heads_kv, head_dim_v, max_blocks;
};

Sizes sizes_of(const Tensor &q, const Tensor &k_cache, const Tensor &v_cache, const Tensor &block_table) {
  if (q.dim() != 4) fail("q is " + describe(q) + ", expected [batch, heads_q, n_q, head_dim]");
  if (k_cache.dim() != 4) {
    fail("k_cache is " + describe(k_cache) + ", expected [num_blocks, block_size, heads_kv, head_dim]");
  }
  if (v_cache.dim() != 4) {
    fail("v_cache is " + describe(v_cache) + ", expected [num_blocks, block_size, heads_kv, head_dim_v]");
  }
  if (block_table.dim() != 2) fail("block_table is " + describe(block_table) + ", expected [batch, max_blocks]");
  return {q.size(0),       q.size(1),       q.size(2),       q.size(3),          k_cache.size(0),
          k_cache.size(1), k_cache.size(2), v_cache.size(3), block_table.size(1)};
}

// [blocks, block_size, heads, channels] as C's [blocks, heads, block_size, channels]. A dimension of size 1 may have
// any stride, and gets the one that the others imply. Caches are large: one that would have to be copied is refused.
sl_tensor4 view_cache(const char *name, const Tensor &cache) {
  int64_t block = cache.stride(0), token = cache.stride(1);
  if (cache.size(3) > 1 && cache.stride(3) != 1) {
    fail(std::string(name) + " has the stride " + std::to_string(cache.stride(3)) + " between channels, expected 1");
  }
  if (cache.size(0) <= 1 && cache.size(1) <= 1) block = token = 1;
  if (cache.size(0) <= 1) block = cache.size(1) * token;
  if (cache.size(1) <= 1) token = block;
  return {const_cast<void *>(cache.const_data_ptr()), block, cache.stride(2), token};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gated_attention_paged(Tensor q, Tensor k_cache, Tensor v_cache, Tensor a,
                                                         Tensor b_cache, Tensor block_table, Tensor seqlens_k,
                                                         OptionalTensor logit_tau, OptionalTensor q_offset,
                                                         OptionalTensor attn_mask, OptionalTensor alibi_slopes,
                                                         bool causal, int64_t window, int64_t sinks,
                                                         int64_t sliding_window, double softcap, double scale) {
  Sizes sizes = sizes_of(q, k_cache, v_cache, block_table);
  auto [B, Hq, Nq, D, blocks, block_size, Hkv, Dv, max_blocks] = sizes;
  ScalarType dtype = q.scalar_type();
  ScalarType gate_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  sl_gated_attention_args args{};
  args.dtype = dtype_of(q, "q");
  auto check = [&q](const char *name, const Tensor &tensor, const std::vector<int64_t> &shape, ScalarType wanted,
                    const std::string &expected) {
    check_attention_tensor(name, tensor, shape, wanted, expected + " = " + shape_text(shape), q);
  };
  check("k_cache", k_cache, {blocks, block_size, Hkv, D}, dtype,
        "the dtype of q and [num_blocks, block_size, heads_kv, head_dim]");
  check("v_cache", v_cache, {blocks, block_size, Hkv, Dv}, dtype,
        "the dtype of q and [num_blocks, block_size, heads_kv, head_dim_v]");
  const std::string of_gates = "float32 (float64 with float64 q) ";
  check("a", a, {B, Hq, Nq}, gate_dtype, of_gates + "[batch, heads_q, n_q]");
  check("b_cache", b_cache, {blocks, block_size, Hkv}, gate_dtype, of_gates + "[num_blocks, block_size, heads_kv]");
  check("block_table", block_table, {B, max_blocks}, ScalarType::Int, "int32 [batch, max_blocks]");
  if (logit_tau) check("logit_tau", *logit_tau, {B, Hq}, gate_dtype, of_gates + "[batch, heads_q]");
  if (alibi_slopes) check("alibi_slopes", *alibi_slopes, {B, Hq}, gate_dtype, of_gates + "[batch, heads_q]");
  bool is_long = seqlens_k.scalar_type() == ScalarType::Long;
  check("seqlens_k", seqlens_k, {B}, is_long ? ScalarType::Long : ScalarType::Int, "int32 or int64 [batch]");
  if (q_offset) check("q_offset", *q_offset, {B}, ScalarType::Long, "int64 [batch]");

  args.batch = B, args.heads_q = Hq, args.heads_kv = Hkv, args.n_q = Nq, args.head_dim = D, args.head_dim_v = Dv;
  args.causal = causal, args.window = window, args.sinks = sinks, args.sliding_window = sliding_window;
  args.softcap = softcap, args.scale = scale;
  args.max_blocks = max_blocks, args.block_size = block_size, args.blocks = blocks;
  size_t bytes = 0;
  check_status(sl_gated_attention_workspace_size(&args, &bytes));  // the numbers, before anything is copied
  Tensor table = torch::stable::contiguous(block_table), lengths = torch::stable::contiguous(seqlens_k);
  OptionalTensor offsets = q_offset ? OptionalTensor(torch::stable::contiguous(*q_offset)) : std::nullopt;
  args.q_offset = integers_of(offsets);
  std::vector<int64_t> places(3 * static_cast<size_t>(B));
  check_status(sl_gated_attention_place_pages(&args, table.const_data_ptr(), lengths.const_data_ptr(),
                                              is_long ? SL_I64 : SL_I32, places.data()));
  if (attn_mask) check_mask(*attn_mask, {B, Hq, Nq, max_blocks * block_size}, q);

  Tensor q_rows = with_dense_rows(q);
  args.q = view4(q_rows), args.a = view3(a);
  args.k = view_cache("k_cache", k_cache), args.v = view_cache("v_cache", v_cache);
  args.b = {const_cast<void *>(b_cache.const_data_ptr()), b_cache.stride(0), b_cache.stride(2), b_cache.stride(1)};
  OptionalTensor tau = logit_tau, slopes = alibi_slopes;
  for (OptionalTensor *tensor : {&tau, &slopes}) {
    if (*tensor) *tensor = torch::stable::contiguous(**tensor);
  }
  args.logit_tau = tau ? tau->const_data_ptr() : nullptr;
  args.alibi_slopes = slopes ? slopes->const_data_ptr() : nullptr;
  args.attn_mask = view_mask(attn_mask);
  sl_executor executor = torch_executor();
  args.executor = &executor;
  check_status(sl_gated_attention_workspace_size(&args, &bytes));
  Tensor out = empty({B, Hq, Nq, Dv}, dtype, q), lse = empty({B, Hq, Nq}, gate_dtype, q);
  Tensor workspace = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, q);
  Tensor kept = empty({B, Hq, Nq}, ScalarType::Int, q);
  args.out = view4(out), args.lse = view3(lse), args.kept = kept.mutable_data_ptr();
  args.workspace = workspace.mutable_data_ptr(), args.workspace_size = bytes;
  check_status(sl_gated_attention(&args));
  return {out, lse, kept};
}

}  // namespace sluice

STABLE_TORCH_LIBRARY_IMPL(sluice, CPU, library) {
  SLUICE_IMPLEMENT(SL_GATED_ATTENTION_PAGED_SCHEMA, sluice::gated_attention_paged);
}

SLUICE_ELSEWHERE(library) { SLUICE_REFUSE(SL_GATED_ATTENTION_PAGED_SCHEMA, sluice::gated_attention_paged, false); }

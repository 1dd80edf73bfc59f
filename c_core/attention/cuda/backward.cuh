/* Backward pass on CUDA, in two kernels, so that each gradient has one warp that sums it in a fixed order: the first
 * goes over query rows (dq, da, and D_i for the second), the second over keys (dk, dv, db). */
#ifndef SL_ATTENTION_CUDA_BACKWARD_CUH
#define SL_ATTENTION_CUDA_BACKWARD_CUH

#include "attention/cuda/forward.cuh"

namespace sluice_cuda {

/* P_ij from the score and the row's lse. A kept pair of a row with lse = -inf has a score of -inf, and P = 0. */
template <typename N>
__device__ N probability(N score, N lse) {
  return lse == -static_cast<N>(INFINITY) ? N{0} : exp(score - lse);
}

/* Each pair has an element of its own. */
template <typename N, typename Row>
__device__ N *mask_gradient_at(const sl_gated_attention_args &args, const Row &row, int64_t key) {
  const sl_attention_mask &mask = args.dattn_mask;
  return static_cast<N *>(mask.data) + row.batch * mask.batch_stride + row.head * mask.head_stride +
         row.query * mask.query_stride + key * mask.key_stride;
}

template <typename T>
__global__ void __launch_bounds__(BLOCK_WARPS *WARP)
    differentiate_rows(const sl_gated_attention_args args, Compute<T> *row_means, int64_t rows) {
  using N = Compute<T>;
  __shared__ N staged[BLOCK_WARPS][2][SL_ATTENTION_MAX_HEAD_DIM];
  const N scale = static_cast<N>(args.scale);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int width = static_cast<int>(args.head_dim), width_v = static_cast<int>(args.head_dim_v);
  N *q = staged[warp][0], *dout = staged[warp][1];

  for (int64_t index = int64_t{blockIdx.x} * BLOCK_WARPS + warp; index < rows;
       index += int64_t{gridDim.x} * BLOCK_WARPS) {
    QueryRow<T> row = find_query_row<T>(args, index);
    const T *out = row_of<const T>(args.out, row.batch, row.head, row.query);
    __syncwarp();
    stage_row(q, row_of<const T>(args.q, row.batch, row.head, row.query), width, lane);
    stage_row(dout, row_of<const T>(args.dout, row.batch, row.head, row.query), width_v, lane);
    __syncwarp();
    N mean = 0; /* D_i */
    for (int channel = lane; channel < width_v; channel += WARP) mean += dout[channel] * Number<T>::read(out[channel]);
    mean = sum_over_warp(mean);
    if (args.dlse.data) mean -= *cell_of<N>(args.dlse, row.batch, row.head, row.query);
    if (lane == 0) row_means[index] = mean;
    N lse = *cell_of<N>(args.lse, row.batch, row.head, row.query);

    for (int64_t key = lane; args.dattn_mask.data && key < args.n_k; key += WARP) {
      *mask_gradient_at<N>(args, row, key) = 0;
    }
    __syncwarp();
    N da = 0, sums[LANE_CHANNELS] = {};
    for (int64_t first = row.key_begin; first < row.key_end; first += WARP) {
      Pair<N> pair = judge_key(args, row, first + lane);
      unsigned kept = __ballot_sync(ALL_LANES, pair.kept);
      N ds = 0;
      if (pair.kept) {
        int64_t key = first + lane;
        N raw = scale * dot_staged(q, row_of<const T>(args.k, row.batch, row.head_kv, key), width), bend;
        N p = probability(bend_score(args, row.batch, row.head, row.position, key, raw, bend) + pair.mask, lse);
        N e = dot_staged(dout, row_of<const T>(args.v, row.batch, row.head_kv, key), width_v);
        ds = p * (pair.gate * e - mean);
        da += p * e * pair.slope;
        if (args.dattn_mask.data) *mask_gradient_at<N>(args, row, key) = ds;
        ds *= bend;
      }
      for (; kept; kept &= kept - 1) {
        int source = __ffs(static_cast<int>(kept)) - 1;
        add_scaled_row(sums, __shfl_sync(ALL_LANES, ds, source),
                       row_of<const T>(args.k, row.batch, row.head_kv, first + source), width, lane);
      }
    }
    write_row(row_of<T>(args.dq, row.batch, row.head, row.query), sums, scale, width, lane);
    da = sum_over_warp(da);
    if (lane == 0) {
      N a = *cell_of<N>(args.a, row.batch, row.head, row.query);
      *cell_of<N>(args.da, row.batch, row.head, row.query) = logit_is_clamped(a) ? 0 : da;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(BLOCK_WARPS *WARP)
    differentiate_keys(const sl_gated_attention_args args, const Compute<T> *row_means, int64_t keys) {
  using N = Compute<T>;
  __shared__ N staged[BLOCK_WARPS][2][SL_ATTENTION_MAX_HEAD_DIM];
  const N scale = static_cast<N>(args.scale);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int width = static_cast<int>(args.head_dim), width_v = static_cast<int>(args.head_dim_v);
  const int64_t group = args.heads_q / args.heads_kv;
  N *k = staged[warp][0], *v = staged[warp][1];

  for (int64_t index = int64_t{blockIdx.x} * BLOCK_WARPS + warp; index < keys;
       index += int64_t{gridDim.x} * BLOCK_WARPS) {
    int64_t key = index % args.n_k, head_kv = index / args.n_k % args.heads_kv,
            batch = index / args.n_k / args.heads_kv;
    KeyRange range = key_range_of(args, batch);
    int64_t past = q_offset_of(args, batch), sinks_end = end_of_sinks(args, batch, range.begin);
    bool in_range = range.begin <= key && key < range.end;
    __syncwarp();
    stage_row(k, row_of<const T>(args.k, batch, head_kv, key), width, lane);
    stage_row(v, row_of<const T>(args.v, batch, head_kv, key), width_v, lane);
    __syncwarp();
    N b = *cell_of<N>(args.b, batch, head_kv, key);
    int64_t first_query = args.causal && key > past ? key - past : 0; /* position = query + past >= key */

    N db = 0, dk_sums[LANE_CHANNELS] = {}, dv_sums[LANE_CHANNELS] = {};
    for (int64_t head = head_kv * group; in_range && head < (head_kv + 1) * group; ++head) {
      N threshold = threshold_of<N>(args, batch, head);
      for (int64_t first = first_query; first < args.n_q; first += WARP) {
        int64_t query = first + lane;
        Pair<N> pair = {};
        if (query < args.n_q) {
          N a = clamp_logit(*cell_of<N>(args.a, batch, head, query));
          N mask = mask_at<N>(args.attn_mask, batch, head, query, key);
          pair = judge_pair(args, a, clamp_logit(b), mask, threshold, query + past, sinks_end, key);
        }
        unsigned kept = __ballot_sync(ALL_LANES, pair.kept);
        N ds = 0, weight = 0;
        if (pair.kept) {
          N lse = *cell_of<N>(args.lse, batch, head, query);
          N raw = scale * dot_staged(k, row_of<const T>(args.q, batch, head, query), width), bend;
          N p = probability(bend_score(args, batch, head, query + past, key, raw, bend) + pair.mask, lse);
          N e = dot_staged(v, row_of<const T>(args.dout, batch, head, query), width_v);
          N mean = row_means[(batch * args.heads_q + head) * args.n_q + query];
          weight = p * pair.gate;
          ds = p * (pair.gate * e - mean) * bend;
          db += p * e * pair.slope;
        }
        for (; kept; kept &= kept - 1) {
          int source = __ffs(static_cast<int>(kept)) - 1;
          add_scaled_row(dk_sums, __shfl_sync(ALL_LANES, ds, source),
                         row_of<const T>(args.q, batch, head, first + source), width, lane);
          add_scaled_row(dv_sums, __shfl_sync(ALL_LANES, weight, source),
                         row_of<const T>(args.dout, batch, head, first + source), width_v, lane);
        }
      }
    }
    write_row(row_of<T>(args.dk, batch, head_kv, key), dk_sums, scale, width, lane);
    write_row(row_of<T>(args.dv, batch, head_kv, key), dv_sums, N{1}, width_v, lane);
    db = sum_over_warp(db);
    if (lane == 0) *cell_of<N>(args.db, batch, head_kv, key) = logit_is_clamped(b) ? 0 : db;
  }
}

}  // namespace sluice_cuda

#endif

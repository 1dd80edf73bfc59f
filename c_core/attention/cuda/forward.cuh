/* Forward pass on CUDA: one warp per query row. Its lanes judge 32 keys at a time and compute the scores of those that
 * are kept, then each lane adds up its own channels of the kept value rows under an online softmax. */
#ifndef SL_ATTENTION_CUDA_FORWARD_CUH
#define SL_ATTENTION_CUDA_FORWARD_CUH

#include "attention/cuda/pair.cuh"

namespace sluice_cuda {

constexpr int BLOCK_WARPS = 4;

/* Where a query row is, and what the judging of its pairs needs. */
template <typename T>
struct QueryRow {
  int64_t batch, head, head_kv, query, position, key_begin, key_end, sinks_end;
  Compute<T> a, threshold; /* a is clamped */
};

template <typename T>
__device__ QueryRow<T> find_query_row(const sl_gated_attention_args &args, int64_t index) {
  QueryRow<T> row;
  row.query = index % args.n_q;
  row.head = index / args.n_q % args.heads_q;
  row.batch = index / args.n_q / args.heads_q;
  row.head_kv = row.head / (args.heads_q / args.heads_kv);
  row.position = row.query + q_offset_of(args, row.batch);
  KeyRange range = key_range_of(args, row.batch);
  row.key_begin = range.begin;
  row.sinks_end = end_of_sinks(args, row.batch, range.begin);
  row.key_end = args.causal && row.position + 1 < range.end ? row.position + 1 : range.end;
  if (args.sliding_window > 0 && args.sliding_window < args.n_k + args.n_q) {
    int64_t first = row.position - args.sliding_window + 1, last = row.position + args.sliding_window;
    row.key_begin = first > row.key_begin ? first : row.key_begin;
    row.key_end = last < row.key_end ? last : row.key_end;
  }
  row.a = clamp_logit(*cell_of<Compute<T>>(args.a, row.batch, row.head, row.query));
  row.threshold = threshold_of<Compute<T>>(args, row.batch, row.head);
  return row;
}

template <typename T>
__device__ Pair<Compute<T>> judge_key(const sl_gated_attention_args &args, const QueryRow<T> &row, int64_t key) {
  if (key >= row.key_end) return {};
  Compute<T> b = clamp_logit(*cell_of<Compute<T>>(args.b, row.batch, row.head_kv, key));
  Compute<T> mask = mask_at<Compute<T>>(args.attn_mask, row.batch, row.head, row.query, key);
  return judge_pair(args, row.a, b, mask, row.threshold, row.position, row.sinks_end, key);
}

template <typename T>
__global__ void __launch_bounds__(BLOCK_WARPS *WARP) attend_rows(const sl_gated_attention_args args, int64_t rows) {
  using N = Compute<T>;
  __shared__ N staged[BLOCK_WARPS][SL_ATTENTION_MAX_HEAD_DIM];
  const N infinity = static_cast<N>(INFINITY), scale = static_cast<N>(args.scale);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int width = static_cast<int>(args.head_dim), width_v = static_cast<int>(args.head_dim_v);
  N *q = staged[warp];

  for (int64_t index = int64_t{blockIdx.x} * BLOCK_WARPS + warp; index < rows;
       index += int64_t{gridDim.x} * BLOCK_WARPS) {
    QueryRow<T> row = find_query_row<T>(args, index);
    __syncwarp();
    stage_row(q, row_of<const T>(args.q, row.batch, row.head, row.query), width, lane);
    __syncwarp();

    N maximum = -infinity, sum = 0, sums[LANE_CHANNELS] = {};
    int32_t count = 0;
    for (int64_t first = row.key_begin; first < row.key_end; first += WARP) {
      Pair<N> pair = judge_key(args, row, first + lane);
      unsigned kept = __ballot_sync(ALL_LANES, pair.kept);
      if (!kept) continue;
      count += __popc(kept);
      N score = -infinity;
      if (pair.kept) {
        int64_t key = first + lane;
        N raw = scale * dot_staged(q, row_of<const T>(args.k, row.batch, row.head_kv, key), width), bend;
        score = bend_score(args, row.batch, row.head, row.position, key, raw, bend) + pair.mask;
      }
      N new_maximum = fmax(maximum, max_over_warp(score));
      N shift = new_maximum == -infinity ? 0 : new_maximum; /* -inf - -inf would be NaN */
      N keep = exp(maximum - shift);
      N p = pair.kept ? exp(score - shift) : 0;
      N weight = p * pair.gate;
      sum = sum * keep + sum_over_warp(p);
      for (int part = 0; part < LANE_CHANNELS; ++part) sums[part] *= keep;
      for (; kept; kept &= kept - 1) {
        int source = __ffs(static_cast<int>(kept)) - 1;
        add_scaled_row(sums, __shfl_sync(ALL_LANES, weight, source),
                       row_of<const T>(args.v, row.batch, row.head_kv, first + source), width_v, lane);
      }
      maximum = new_maximum;
    }

    /* sum is 0 for a row that keeps nothing, or only scores of -inf: out is then what was added up, which is 0. */
    write_row(row_of<T>(args.out, row.batch, row.head, row.query), sums, sum == 0 ? N{1} : 1 / sum, width_v, lane);
    if (args.kept && lane == 0) static_cast<int32_t *>(args.kept)[index] = count;
    if (args.lse.data && lane == 0) {
      *cell_of<N>(args.lse, row.batch, row.head, row.query) = (maximum == -infinity ? 0 : maximum) + log(sum);
    }
  }
}

}  // namespace sluice_cuda

#endif

/* Which pairs of queries and keys gated attention keeps, with which gate, and where their rows are in memory. */
#ifndef SL_ATTENTION_CUDA_PAIR_CUH
#define SL_ATTENTION_CUDA_PAIR_CUH

#include <sluice/gated_attention.h>

#include "runtime/cuda/common.cuh"
#include "runtime/number.h"

namespace sluice_cuda {

constexpr int LANE_CHANNELS = SL_ATTENTION_MAX_HEAD_DIM / WARP; /* channels that one lane may have to hold */

/* The type of a, b, logit_tau and lse is the one that T is computed in. */
template <typename T>
using Compute = typename Number<T>::Compute;

template <typename T>
__device__ T *row_of(const sl_tensor4 &tensor, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T *>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride +
         token * tensor.token_stride;
}

template <typename N>
__device__ N *cell_of(const sl_tensor3 &tensor, int64_t batch, int64_t head, int64_t token) {
  return static_cast<N *>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride +
         token * tensor.token_stride;
}

/* Not fmin and fmax: NaN stays NaN. */
template <typename N>
__device__ N clamp_logit(N logit) {
  const N limit = static_cast<N>(SL_GATE_LOGIT_LIMIT);
  return logit > limit ? limit : logit < -limit ? -limit : logit;
}

template <typename N>
__device__ bool logit_is_clamped(N logit) {
  return logit > static_cast<N>(SL_GATE_LOGIT_LIMIT) || logit < -static_cast<N>(SL_GATE_LOGIT_LIMIT);
}

struct KeyRange {
  int64_t begin, end;
};

/* The values cannot be checked without waiting for the device, so they are clamped. */
__device__ inline KeyRange key_range_of(const sl_gated_attention_args &args, int64_t batch) {
  if (!args.key_range) return {0, args.n_k};
  int64_t begin = args.key_range[2 * batch], end = args.key_range[2 * batch + 1];
  begin = begin < 0 ? 0 : begin > args.n_k ? args.n_k : begin;
  end = end < begin ? begin : end > args.n_k ? args.n_k : end;
  return {begin, end};
}

/* The place of query 0 among the keys, clamped. */
__device__ inline int64_t q_offset_of(const sl_gated_attention_args &args, int64_t batch) {
  int64_t last = args.n_k - args.n_q; /* below 0 with more queries than keys, for which no offset is right */
  if (!args.q_offset || last <= 0) return last;
  int64_t offset = args.q_offset[batch];
  return offset < 0 ? 0 : offset > last ? last : offset;
}

/* The key up to which keys are sinks, for a range that begins at key_begin. */
__device__ inline int64_t end_of_sinks(const sl_gated_attention_args &args, int64_t batch, int64_t key_begin) {
  const int64_t least = -(int64_t{1} << 31);
  int64_t begin = args.text_begin ? args.text_begin[batch] : key_begin;
  begin = begin < least ? least : begin > key_begin ? key_begin : begin;
  return begin + (args.sinks < args.n_k - begin ? args.sinks : args.n_k - begin);
}

template <typename N>
__device__ N threshold_of(const sl_gated_attention_args &args, int64_t batch, int64_t head) {
  if (!args.logit_tau) return -static_cast<N>(INFINITY);
  return static_cast<const N *>(args.logit_tau)[batch * args.heads_q + head];
}

/* m_ij; 0 without a mask. */
template <typename N>
__device__ N mask_at(const sl_attention_mask &mask, int64_t batch, int64_t head, int64_t query, int64_t key) {
  if (!mask.data) return 0;
  int64_t index =
      batch * mask.batch_stride + head * mask.head_stride + query * mask.query_stride + key * mask.key_stride;
  switch (mask.dtype) {
    case SL_F32: return static_cast<N>(static_cast<const float *>(mask.data)[index]);
    case SL_F64: return static_cast<N>(static_cast<const double *>(mask.data)[index]);
    case SL_BF16: return Number<__nv_bfloat16>::read(static_cast<const __nv_bfloat16 *>(mask.data)[index]);
    case SL_F16: return Number<__half>::read(static_cast<const __half *>(mask.data)[index]);
    default: return static_cast<const uint8_t *>(mask.data)[index] ? N{0} : -static_cast<N>(INFINITY);
  }
}

/* s_ij from r_ij, but for the mask, and in bend dr_ij / ds_ij. */
template <typename N>
__device__ N bend_score(const sl_gated_attention_args &args, int64_t batch, int64_t head, int64_t position, int64_t key,
                        N raw, N &bend) {
  bend = 1;
  if (args.softcap > 0) {
    N bent = tanh(raw / static_cast<N>(args.softcap));
    bend = 1 - bent * bent;
    raw = static_cast<N>(args.softcap) * bent;
  }
  if (args.alibi_slopes) {
    int64_t distance = position < key ? key - position : position - key;
    raw -= static_cast<const N *>(args.alibi_slopes)[batch * args.heads_q + head] * static_cast<N>(distance);
  }
  return raw;
}

template <typename N>
struct Pair {
  bool kept;
  N gate;  /* g_ij */
  N slope; /* dg_ij / dz_ij; 0 for near pairs */
  N mask;  /* m_ij */
};

/* a and b are clamped already, the mask was looked up, and the key is in its range. Keys below sinks_end are sinks. */
template <typename N>
__device__ Pair<N> judge_pair(const sl_gated_attention_args &args, N a, N b, N mask, N threshold, int64_t position,
                              int64_t sinks_end, int64_t key) {
  int64_t distance = position < key ? key - position : position - key;
  if (args.causal && key > position) return {};
  if (args.sliding_window > 0 && distance >= args.sliding_window) return {};
  if (mask == -static_cast<N>(INFINITY)) return {};
  if (distance < args.window || key < sinks_end) return {true, 1, 0, mask};
  N z = a + b;
  if (z < threshold && !(args.causal && distance == 0)) return {};
  N e = exp(-z); /* at most e^80: finite in float32, and so is its product with the gate */
  N gate = 1 / (1 + e);
  return {true, gate, gate * (e * gate), mask};
}

/* Brings a row's channels to shared memory; between barriers, as the lanes of the warp read all of it. */
template <typename T>
__device__ void stage_row(Compute<T> *staged, const T *row, int width, int lane) {
  for (int channel = lane; channel < width; channel += WARP) staged[channel] = Number<T>::read(row[channel]);
}

template <typename T>
__device__ Compute<T> dot_staged(const Compute<T> *staged, const T *row, int width) {
  Compute<T> sum = 0;
  for (int channel = 0; channel < width; ++channel) sum += staged[channel] * Number<T>::read(row[channel]);
  return sum;
}

/* sums += weight * row, each lane for its own channels: lane, lane + 32, ... */
template <typename T>
__device__ void add_scaled_row(Compute<T> (&sums)[LANE_CHANNELS], Compute<T> weight, const T *row, int width,
                               int lane) {
  for (int part = 0; part < LANE_CHANNELS; ++part) {
    int channel = part * WARP + lane;
    if (channel < width) sums[part] += weight * Number<T>::read(row[channel]);
  }
}

template <typename T>
__device__ void write_row(T *row, const Compute<T> (&sums)[LANE_CHANNELS], Compute<T> factor, int width, int lane) {
  for (int part = 0; part < LANE_CHANNELS; ++part) {
    int channel = part * WARP + lane;
    if (channel < width) row[channel] = Number<T>::write(sums[part] * factor);
  }
}

}  // namespace sluice_cuda

#endif

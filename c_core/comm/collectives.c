/* The collectives as the contract has them: checks of arguments, then exchange.h or reductions.h. */
#include <string.h>

#include "comm/exchange.h"
#include "comm/reduce.h"
#include "comm/reductions.h"
#include "comm/step.h"
#include "runtime/status.h"

static sl_status check_comm(const sl_comm *comm) {
  SL_REQUIRE(comm, SL_INVALID_ARGUMENT, "comm is NULL");
  SL_REQUIRE(comm->started, SL_INVALID_ARGUMENT, "comm has not been started, expected sl_comm_start() before");
  return SL_OK;
}

static sl_status check_root(const sl_comm *comm, int root) {
  SL_REQUIRE(root >= 0 && root < comm->size, SL_INVALID_ARGUMENT, "root is %d, expected 0 to %d", root, comm->size - 1);
  return SL_OK;
}

static sl_status check_buffer(const void *buffer, size_t bytes, const char *name) {
  SL_REQUIRE(buffer || bytes == 0, SL_INVALID_ARGUMENT, "%s is NULL, expected %zu bytes", name, bytes);
  SL_REQUIRE(bytes <= PTRDIFF_MAX, SL_OUT_OF_RANGE, "%s has %zu bytes, expected %td at most", name, bytes, PTRDIFF_MAX);
  return SL_OK;
}

static sl_status check_buffers(const sl_comm *comm, const void *const *buffers, const size_t *bytes, const char *name) {
  SL_REQUIRE(buffers && bytes, SL_INVALID_ARGUMENT, "%s and its sizes must not be NULL", name);
  for (int i = 0; i < comm->size; ++i) {
    SL_REQUIRE(buffers[i] || bytes[i] == 0, SL_INVALID_ARGUMENT, "%s[%d] is NULL, expected %zu bytes", name, i,
               bytes[i]);
    SL_REQUIRE(bytes[i] <= PTRDIFF_MAX, SL_OUT_OF_RANGE, "%s[%d] has %zu bytes, expected %td at most", name, i,
               bytes[i], PTRDIFF_MAX);
  }
  return SL_OK;
}

static sl_status check_count(size_t count, sl_dtype dtype, const char *name) {
  SL_REQUIRE(count <= PTRDIFF_MAX / sl_dtype_size(dtype), SL_OUT_OF_RANGE,
             "%s is %zu elements of %s, expected %td bytes at most", name, count, sl_dtype_name(dtype), PTRDIFF_MAX);
  return SL_OK;
}

sl_status sl_comm_barrier(sl_comm *comm, int64_t timeout) {
  SL_CHECK(check_comm(comm));
  sl_signature signature = {.kind = SL_CALL_BARRIER, .root = -1};
  SL_CHECK(sl_call_begin(comm, &signature, timeout));
  SL_CHECK(sl_step_begin(comm));
  sl_step_arrive(comm);
  return sl_step_wait(comm);
}

sl_status sl_comm_broadcast(sl_comm *comm, void *buffer, size_t bytes, int root, int64_t timeout) {
  SL_CHECK(check_comm(comm));
  SL_CHECK(check_root(comm, root));
  SL_CHECK(check_buffer(buffer, bytes, "buffer"));
  const void *in[1] = {buffer};
  void *out[SL_COMM_MAX_SIZE];
  size_t out_bytes[SL_COMM_MAX_SIZE];
  out[root] = buffer;
  out_bytes[root] = bytes;
  sl_exchange exchange = {.from = root, .to = -1, .same = true, .in = in, .in_bytes = &bytes};
  exchange.out = out;
  exchange.out_bytes = out_bytes;
  return sl_exchange_run(comm, &exchange, SL_CALL_BROADCAST, timeout);
}

sl_status sl_comm_all_reduce(sl_comm *comm, const void *in, void *out, size_t count, sl_dtype dtype, sl_reduce_op op,
                             double factor, int64_t timeout) {
  SL_CHECK(check_comm(comm));
  SL_CHECK(sl_reduce_validate(dtype, op, factor));
  SL_CHECK(check_count(count, dtype, "count"));
  SL_CHECK(check_buffer(in, count * sl_dtype_size(dtype), "in"));
  SL_CHECK(check_buffer(out, count * sl_dtype_size(dtype), "out"));
  sl_reduction reduction = {dtype, op, op == SL_REDUCE_PREMUL_SUM ? factor : 0};
  return sl_reduction_run(comm, in, out, count, &reduction, -1, timeout);
}

sl_status sl_comm_reduce(sl_comm *comm, const void *in, void *out, size_t count, sl_dtype dtype, sl_reduce_op op,
                         double factor, int root, int64_t timeout) {
  SL_CHECK(check_comm(comm));
  SL_CHECK(check_root(comm, root));
  SL_CHECK(sl_reduce_validate(dtype, op, factor));
  SL_CHECK(check_count(count, dtype, "count"));
  SL_CHECK(check_buffer(in, count * sl_dtype_size(dtype), "in"));
  if (root == comm->rank) SL_CHECK(check_buffer(out, count * sl_dtype_size(dtype), "out"));
  sl_reduction reduction = {dtype, op, op == SL_REDUCE_PREMUL_SUM ? factor : 0};
  return sl_reduction_run(comm, in, root == comm->rank ? out : NULL, count, &reduction, root, timeout);
}

sl_status sl_comm_reduce_scatter(sl_comm *comm, const void *const *in, const size_t *counts, void *out, sl_dtype dtype,
                                 sl_reduce_op op, double factor, int64_t timeout) {
  SL_CHECK(check_comm(comm));
  SL_CHECK(sl_reduce_validate(dtype, op, factor));
  SL_CHECK(check_buffers(comm, in, counts, "in"));
  size_t total = 0;
  for (int i = 0; i < comm->size; ++i) {
    SL_REQUIRE(!__builtin_add_overflow(total, counts[i], &total), SL_OUT_OF_RANGE, "counts add up to more than size_t");
  }
  SL_CHECK(check_count(total, dtype, "the sum of counts"));
  SL_CHECK(check_buffer(out, counts[comm->rank] * sl_dtype_size(dtype), "out"));
  sl_reduction reduction = {dtype, op, op == SL_REDUCE_PREMUL_SUM ? factor : 0};
  return sl_reduction_scatter(comm, in, counts, out, &reduction, timeout);
}

sl_status sl_comm_all_gather(sl_comm *comm, const void *in, size_t bytes, void *const *out, const size_t *out_bytes,
                             int64_t timeout) {
  SL_CHECK(check_comm(comm));
  SL_CHECK(check_buffer(in, bytes, "in"));
  SL_CHECK(check_buffers(comm, (const void *const *)out, out_bytes, "out"));
  SL_REQUIRE(out_bytes[comm->rank] == bytes, SL_INVALID_ARGUMENT,
             "out_bytes[%d] is %zu, but this rank's own in has %zu bytes", comm->rank, out_bytes[comm->rank], bytes);
  sl_exchange exchange = {.from = -1, .to = -1, .same = true, .in = &in, .in_bytes = &bytes};
  exchange.out = out;
  exchange.out_bytes = out_bytes;
  return sl_exchange_run(comm, &exchange, SL_CALL_ALL_GATHER, timeout);
}

sl_status sl_comm_gather(sl_comm *comm, const void *in, size_t bytes, void *const *out, const size_t *out_bytes,
                         int root, int64_t timeout) {
  SL_CHECK(check_comm(comm));
  SL_CHECK(check_root(comm, root));
  SL_CHECK(check_buffer(in, bytes, "in"));
  if (root == comm->rank) {
    SL_CHECK(check_buffers(comm, (const void *const *)out, out_bytes, "out"));
    SL_REQUIRE(out_bytes[root] == bytes, SL_INVALID_ARGUMENT,
               "out_bytes[%d] is %zu, but this rank's own in has %zu bytes", root, out_bytes[root], bytes);
  }
  sl_exchange exchange = {.from = -1, .to = root, .same = true, .in = &in, .in_bytes = &bytes};
  exchange.out = out;
  exchange.out_bytes = out_bytes;
  return sl_exchange_run(comm, &exchange, SL_CALL_GATHER, timeout);
}

sl_status sl_comm_scatter(sl_comm *comm, const void *const *in, const size_t *in_bytes, void *out, size_t bytes,
                          int root, int64_t timeout) {
  SL_CHECK(check_comm(comm));
  SL_CHECK(check_root(comm, root));
  SL_CHECK(check_buffer(out, bytes, "out"));
  if (root == comm->rank) {
    SL_CHECK(check_buffers(comm, in, in_bytes, "in"));
    SL_REQUIRE(in_bytes[root] == bytes, SL_INVALID_ARGUMENT,
               "in_bytes[%d] is %zu, but this rank's own out has %zu bytes", root, in_bytes[root], bytes);
  }
  void *outs[SL_COMM_MAX_SIZE];
  size_t out_bytes[SL_COMM_MAX_SIZE];
  outs[root] = out;
  out_bytes[root] = bytes;
  sl_exchange exchange = {.from = root, .to = -1, .in = in, .in_bytes = in_bytes};
  exchange.out = outs;
  exchange.out_bytes = out_bytes;
  return sl_exchange_run(comm, &exchange, SL_CALL_SCATTER, timeout);
}

sl_status sl_comm_all_to_all(sl_comm *comm, const void *const *in, const size_t *in_bytes, void *const *out,
                             const size_t *out_bytes, int64_t timeout) {
  SL_CHECK(check_comm(comm));
  SL_CHECK(check_buffers(comm, in, in_bytes, "in"));
  SL_CHECK(check_buffers(comm, (const void *const *)out, out_bytes, "out"));
  SL_REQUIRE(in_bytes[comm->rank] == out_bytes[comm->rank], SL_INVALID_ARGUMENT,
             "in_bytes[%d] is %zu and out_bytes[%d] is %zu, expected the same for the own rank", comm->rank,
             in_bytes[comm->rank], comm->rank, out_bytes[comm->rank]);
  sl_exchange exchange = {.from = -1, .to = -1, .in = in, .in_bytes = in_bytes, .out = out, .out_bytes = out_bytes};
  return sl_exchange_run(comm, &exchange, SL_CALL_ALL_TO_ALL, timeout);
}

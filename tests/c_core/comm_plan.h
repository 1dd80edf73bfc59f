/* Random collectives for a soak, the same on every rank, and what is to come of them, computed plainly. */
#ifndef SLUICE_TESTS_COMM_PLAN_H
#define SLUICE_TESTS_COMM_PLAN_H

#include <sluice/comm.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>

#include "support.h"

namespace plan {

using sluice_test::store_number;

/* Contents repeat after this many elements, a prime, so that what is expected is computed once, and a piece that comes
 * to the wrong place is seen. */
const size_t period = 61;

enum Kind { BARRIER, BROADCAST, ALL_REDUCE, REDUCE, REDUCE_SCATTER, ALL_GATHER, GATHER, SCATTER, ALL_TO_ALL, KINDS };
const char *const kind_names[] = {"barrier",    "broadcast", "all_reduce", "reduce",    "reduce_scatter",
                                  "all_gather", "gather",    "scatter",    "all_to_all"};

/* The same on all ranks. */
struct Operation {
  Kind kind;
  sl_dtype dtype;
  sl_reduce_op op;
  double factor;
  size_t count; /* elements, of the largest part */
  int root;
  bool even, in_place;
  unsigned salt;

  std::string describe() const {
    return std::string(kind_names[kind]) + " of " + std::to_string(count) + " x " + sl_dtype_name(dtype) + ", op " +
           std::to_string(op) + ", root " + std::to_string(root) + (even ? "" : ", uneven") +
           (in_place ? ", in place" : "");
  }
};

inline unsigned mix(unsigned a, unsigned b, unsigned c) {
  unsigned x = a * 2654435761u ^ (b + 1) * 2246822519u ^ (c + 1) * 3266489917u;
  return (x ^ x >> 15) * 2654435761u >> 7;
}

inline bool is_float(sl_dtype dtype) { return dtype <= SL_F64; }

inline bool exists(sl_dtype dtype, sl_reduce_op op) {
  if (op == SL_REDUCE_PREMUL_SUM) return is_float(dtype);
  if (op == SL_REDUCE_AVG) return dtype != SL_BOOL;
  return op < SL_REDUCE_BAND || !is_float(dtype);
}

inline size_t random_count(std::mt19937 &random) {
  switch (random() % 8) {
    case 0: return random() % 3;
    case 1:
    case 2:
    case 3: return random() % 100;
    case 4:
    case 5: return random() % 5000;
    case 6: return random() % 20000;
    default: return 2048 * (random() % 12) + random() % 3; /* round the borders of pieces */
  }
}

inline Operation random_operation(std::mt19937 &random, int size) {
  Operation result{};
  result.kind = static_cast<Kind>(random() % KINDS);
  do {
    result.dtype = static_cast<sl_dtype>(random() % (SL_BOOL + 1));
    result.op = static_cast<sl_reduce_op>(random() % (SL_REDUCE_PREMUL_SUM + 1));
  } while (!exists(result.dtype, result.op));
  result.factor = random() % 2 ? 0.5 : -2;
  result.count = random_count(random);
  result.root = static_cast<int>(random() % static_cast<unsigned>(size));
  result.even = random() % 2;
  result.in_place = random() % 2;
  result.salt = static_cast<unsigned>(random());
  return result;
}

inline size_t part(const Operation &operation, int from, int to) {
  if (operation.even) return operation.count;
  unsigned chance = mix(operation.salt, static_cast<unsigned>(from), static_cast<unsigned>(to));
  return chance % 4 == 0 ? 0 : chance % (operation.count + 1);
}

/* Small enough for sums and products of eight to be exact in every type, and wrapping in the unsigned. */
inline int value_of(const Operation &operation, int rank, int part, size_t i) {
  unsigned chance =
      mix(operation.salt + static_cast<unsigned>(i % period), static_cast<unsigned>(rank), static_cast<unsigned>(part));
  if (operation.dtype == SL_BOOL) return chance % 5 != 0;
  if (operation.op == SL_REDUCE_PRODUCT) return std::array{-2, -1, 1, 2}[chance % 4];
  return static_cast<int>(chance % 17) - 8;
}

inline int64_t wrap(sl_dtype dtype, int64_t value) {
  return dtype == SL_U8 ? static_cast<uint8_t>(value) : dtype == SL_I8 ? static_cast<int8_t>(value) : value;
}

inline void store(sl_dtype dtype, char *to, double value) {
  int64_t whole = is_float(dtype) ? 0 : static_cast<int64_t>(value);
  if (is_float(dtype))
    store_number(dtype, to, 0, value);
  else
    memcpy(to, &whole, sl_dtype_size(dtype)); /* low bytes first */
}

inline double fold(const Operation &operation, double sum, double x) {
  auto a = static_cast<int64_t>(sum), b = static_cast<int64_t>(x);
  switch (operation.op) {
    case SL_REDUCE_PRODUCT: return static_cast<double>(wrap(operation.dtype, a * b));
    case SL_REDUCE_MIN: return std::min(sum, x);
    case SL_REDUCE_MAX: return std::max(sum, x);
    case SL_REDUCE_BAND: return static_cast<double>(a & b);
    case SL_REDUCE_BOR: return static_cast<double>(a | b);
    case SL_REDUCE_BXOR: return static_cast<double>(a ^ b);
    default: break;
  }
  if (operation.dtype == SL_BOOL) return sum != 0 || x != 0;
  return is_float(operation.dtype) ? sum + x : static_cast<double>(wrap(operation.dtype, a + b));
}

inline double reduced(const Operation &operation, int size, int part, size_t i) {
  double sum = 0;
  for (int rank = 0; rank < size; ++rank) {
    double x = value_of(operation, rank, part, i);
    if (!is_float(operation.dtype)) x = static_cast<double>(wrap(operation.dtype, static_cast<int64_t>(x)));
    if (operation.op == SL_REDUCE_PREMUL_SUM) x *= operation.factor;
    sum = rank ? fold(operation, sum, x) : x;
  }
  if (operation.op != SL_REDUCE_AVG) return sum;
  if (operation.dtype == SL_F64) return sum / size;
  if (is_float(operation.dtype)) return static_cast<float>(sum) / static_cast<float>(size);
  int64_t mean = static_cast<int64_t>(sum) / size; /* towards zero */
  return static_cast<double>(mean);
}

}  // namespace plan

#endif

// The CUDA kernels of gated attention, compiled as C++ and run on the host (cuda_on_host/), against the reference.
#include <gtest/gtest.h>

#include "cuda_on_host/cuda_runtime.h"

// A CUDA build has these symbols already.
#define sluice_cuda sluice_cuda_on_host
#define sl_gated_attention_cuda gated_attention_on_host
#define sl_gated_attention_backward_cuda_workspace_size backward_workspace_size_on_host
#define sl_gated_attention_backward_cuda gated_attention_backward_on_host
#include "attention/cuda/gated_attention.cu"

#include "support.h"

using namespace sluice_test;

namespace {

sl_status run_kernels(AttentionProblem &problem) {
  sl_gated_attention_args args = problem.args();
  size_t bytes = 0;
  SL_CHECK(backward_workspace_size_on_host(&args, &bytes));
  GuardedBuffer workspace(bytes);
  args.workspace = workspace.data(), args.workspace_size = bytes;
  SL_CHECK(gated_attention_on_host(&args, nullptr));
  SL_CHECK(gated_attention_backward_on_host(&args, nullptr));
  EXPECT_TRUE(workspace.intact());
  return SL_OK;
}

struct Result {
  const char *name;
  const Tensor *tensor;
};
std::vector<Result> results_of(const AttentionProblem &p) {
  return {{"out", &p.out}, {"lse", &p.lse}, {"kept", &p.kept}, {"dq", &p.dq},      {"dk", &p.dk},
          {"dv", &p.dv},   {"da", &p.da},   {"db", &p.db},     {"dmask", &p.dmask}};
}

// Largest error, relative to the largest value and to 1, the size of the inputs: a gradient that is 0 in exact
// arithmetic is a difference of numbers of that size. One rounding of the storage type, or float32's sums.
double tolerance_of(sl_dtype dtype) {
  switch (dtype) {
    case SL_F64: return 1e-12;
    case SL_F32: return 1e-5;
    case SL_F16: return 1e-3;
    case SL_BF16: return 8e-3;
    default: return 0;
  }
}

void compare_with_reference(const AttentionShape &shape, uint64_t seed) {
  SCOPED_TRACE(shape.text());
  AttentionProblem want(shape, seed), got(shape, seed);
  sl_gated_attention_args args = want.args();
  ASSERT_EQ(sl_gated_attention_reference(&args), SL_OK) << sl_last_error();
  ASSERT_EQ(sl_gated_attention_backward_reference(&args), SL_OK) << sl_last_error();
  ASSERT_EQ(run_kernels(got), SL_OK) << sl_last_error();
  EXPECT_EQ(got.damage(), "");
  auto wanted = results_of(want), found = results_of(got);
  for (size_t i = 0; i < wanted.size(); ++i) {
    std::vector<double> want_values = wanted[i].tensor->values(), got_values = found[i].tensor->values();
    want_values.push_back(1), got_values.push_back(1);
    Distance distance = measure_distance(got_values, want_values);
    EXPECT_TRUE(distance.same_specials) << wanted[i].name;
    EXPECT_LE(distance.relative_maximum, tolerance_of(shape.dtype)) << wanted[i].name;
  }
}

AttentionShape random_shape(Random &random) {
  AttentionShape shape;
  shape.dtype = random.pick<sl_dtype>({SL_F32, SL_F64, SL_BF16, SL_F16});
  shape.batch = random.integer(1, 2);
  shape.heads_kv = random.integer(1, 2);
  shape.heads_q = shape.heads_kv * random.integer(1, 3);
  shape.n_q = random.integer(1, 40), shape.n_k = random.integer(0, 70);
  shape.head_dim = random.pick<int64_t>({1, 7, 16, 33, 64}), shape.head_dim_v = random.pick<int64_t>({1, 5, 32, 48});
  shape.causal = random.chance(0.6);
  shape.window = random.chance(0.5) ? random.integer(1, 12) : 0;
  shape.sinks = random.chance(0.3) ? random.integer(1, 4) : 0;
  if (random.chance(0.7)) shape.logit_tau = random.uniform(-3, 3);
  for (int64_t batch = 0; batch < shape.batch && random.chance(0.3) * shape.batch > 0; ++batch) {
    int64_t begin = random.integer(0, shape.n_k);
    shape.key_range.push_back(begin), shape.key_range.push_back(random.integer(begin, shape.n_k));
  }
  if (static_cast<int64_t>(shape.key_range.size()) != 2 * shape.batch) shape.key_range.clear();
  shape.place_at_random(random);
  shape.bend_at_random(random);
  shape.output_gate = 0, shape.dropout = 0;
  if (shape.mask && *shape.mask != SL_BOOL) shape.mask_is_broadcast = {};
  shape.layout = random.pick<Layout>({Layout::kDense, Layout::kTokenMajor, Layout::kPadded});
  return shape;
}

}  // namespace

TEST(AttentionCudaOnHost, AgreesWithTheReferenceOnRandomShapes) {
#if defined(__SANITIZE_ADDRESS__)
  const int rounds = 12;  // slow there
#else
  const int rounds = 40;
#endif
  Random random(1);
  for (int i = 0; i < rounds; ++i) compare_with_reference(random_shape(random), static_cast<uint64_t>(i));
}

TEST(AttentionCudaOnHost, AgreesAtTheLargestHeadSize) {
  for (sl_dtype dtype : {SL_F32, SL_F64, SL_BF16}) {
    AttentionShape shape;
    shape.dtype = dtype, shape.n_q = 6, shape.n_k = 35, shape.head_dim = 256, shape.head_dim_v = 250;
    shape.scale = 0.1, shape.logit_tau = -1, shape.causal = true;
    compare_with_reference(shape, 7);
  }
}

TEST(AttentionCudaOnHost, EmptySizesNeedNoLaunch) {
  for (int empty = 0; empty < 3; ++empty) {
    AttentionShape shape;
    (empty == 0 ? shape.batch : empty == 1 ? shape.n_q : shape.n_k) = 0;
    compare_with_reference(shape, 1);
  }
}

TEST(AttentionCudaOnHost, SpecialValuesShowWhereTheReferenceShowsThem) {
  const double nan = NAN, inf = INFINITY;
  for (double special : {nan, inf, -inf}) {
    for (int where = 0; where < 5; ++where) {
      AttentionShape shape;
      shape.n_q = 5, shape.n_k = 37, shape.logit_tau = 0, shape.causal = where % 2 == 0;
      AttentionProblem want(shape, 3), got(shape, 3);
      for (AttentionProblem *problem : {&want, &got}) {
        Tensor *tensors[] = {&problem->q, &problem->k, &problem->v, &problem->a, &problem->b};
        tensors[where]->set(0, 0, 3, 0, special);
      }
      sl_gated_attention_args args = want.args();
      ASSERT_EQ(sl_gated_attention_reference(&args), SL_OK);
      ASSERT_EQ(sl_gated_attention_backward_reference(&args), SL_OK);
      ASSERT_EQ(run_kernels(got), SL_OK);
      auto wanted = results_of(want), found = results_of(got);
      for (size_t i = 0; i < wanted.size(); ++i) {
        EXPECT_TRUE(measure_distance(found[i].tensor->values(), wanted[i].tensor->values()).same_specials)
            << wanted[i].name << " with " << special << " in operand " << where;
      }
    }
  }
}

TEST(AttentionCudaOnHost, ResultDoesNotDependOnTheOrderOfThreads) {
  AttentionShape shape;
  shape.heads_q = 2, shape.n_q = 9, shape.n_k = 70, shape.head_dim = 40, shape.logit_tau = 0, shape.window = 3;
  AttentionProblem forwards(shape, 5), backwards(shape, 5);
  ASSERT_EQ(run_kernels(forwards), SL_OK);
  cuda_on_host::reverse_order = true;
  sl_status status = run_kernels(backwards);
  cuda_on_host::reverse_order = false;
  ASSERT_EQ(status, SL_OK);
  auto first = results_of(forwards), second = results_of(backwards);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_EQ(first[i].tensor->values(), second[i].tensor->values());
}

TEST(AttentionCudaOnHost, PlacesAreClampedInsteadOfRead) {
  AttentionShape shape;
  shape.batch = 3, shape.n_k = 20, shape.causal = true, shape.logit_tau = 2, shape.sinks = 3;
  shape.key_range = {0, 20, 4, 20, 20, 20}, shape.q_offset = {0, 16, 5}, shape.text_begin = {0, 4, -100};
  AttentionProblem want(shape, 2);
  ASSERT_EQ(run_kernels(want), SL_OK);
  shape.key_range = {INT64_MIN, INT64_MAX, 4, 21, 30, 7};
  shape.q_offset = {INT64_MIN, INT64_MAX, 5}, shape.text_begin = {INT64_MAX, 5, INT64_MIN};
  AttentionProblem got(shape, 2);
  ASSERT_EQ(run_kernels(got), SL_OK);
  auto wanted = results_of(want), found = results_of(got);
  for (size_t i = 0; i < wanted.size(); ++i) EXPECT_EQ(wanted[i].tensor->values(), found[i].tensor->values());
}

TEST(AttentionCudaOnHost, FailuresNameTheirCause) {
  AttentionProblem problem(AttentionShape{}, 1);
  sl_gated_attention_args args = problem.args();
  cuda_on_host::next_error = cudaErrorInvalidConfiguration;
  EXPECT_EQ(gated_attention_on_host(&args, nullptr), SL_INTERNAL);
  EXPECT_STREQ(sl_last_error(),
               "gated_attention on CUDA failed: invalid configuration argument "
               "(cudaErrorInvalidConfiguration)");
  EXPECT_EQ(gated_attention_backward_on_host(&args, nullptr), SL_OUT_OF_MEMORY);
  EXPECT_STREQ(sl_last_error(), "workspace_size is 0 bytes, expected at least 16");
  args.heads_q = 0;
  EXPECT_EQ(gated_attention_on_host(&args, nullptr), SL_INVALID_ARGUMENT);
  EXPECT_EQ(gated_attention_on_host(nullptr, nullptr), SL_INVALID_ARGUMENT);
}

TEST(AttentionCudaOnHost, APagedCacheIsRefused) {
  AttentionProblem problem(AttentionShape{}, 1);
  sl_gated_attention_args args = problem.args();
  const int32_t table = 0;
  args.block_table = &table, args.max_blocks = args.blocks = 1, args.block_size = 4;
  EXPECT_EQ(gated_attention_on_host(&args, nullptr), SL_UNSUPPORTED);
  EXPECT_STREQ(sl_last_error(), "block_table is given, expected NULL: a paged cache has no CUDA kernel");
}

TEST(AttentionCudaOnHost, TheStreamIsPassedOn) {
  AttentionProblem problem(AttentionShape{}, 1);
  sl_gated_attention_args args = problem.args();
  int stream = 0;
  ASSERT_EQ(gated_attention_on_host(&args, &stream), SL_OK);
  EXPECT_EQ(static_cast<void *>(cuda_on_host::last_stream), static_cast<void *>(&stream));
}

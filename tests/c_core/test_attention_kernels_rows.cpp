// The micro-ops on token rows where they lie, alone: every table of kernels.def against the formula, and that a result
// depends on its row and token row alone, wherever in a team and in a list they are.
#include "kernel_support.h"

using namespace sluice_test;

namespace {

struct RowOperands {
  RowOperands(Random &random, const sl_attention_kernel *kernel, int64_t team, int64_t width, int64_t channels)
      : source(random_tokens(random, kernel->dtype, 50, channels)),
        tokens(rows_of(source)),
        index(random_index(random, width + 40, 50)),
        stride(channels + 3),
        row_count(team),
        list{&tokens, index.data(), width, width + 40},
        rows(SL_F32, row_count * stride),
        weights(SL_F32, row_count * (width + 5)) {
    double exact = 0;  // what a table multiplies in its dtype must be a number of it
    for (int64_t i = 0; i < rows.count(); ++i) {
      store_number(kernel->dtype, &exact, 0, random.normal());
      rows.set(i, load_number(kernel->dtype, &exact, 0));
    }
    for (int64_t i = 0; i < weights.count(); ++i) weights.set(i, random.normal());
  }
  double product(int64_t r, int64_t c, int64_t j) const {
    return rows.get(r * stride + c) * source.get(0, 0, index[j], c);
  }

  Tensor source;
  sl_token_rows tokens;
  Integers index;
  int64_t stride, row_count;
  sl_row_list list;
  Array rows, weights;
};

const int64_t kChannels[] = {1, 7, 16, 33, 40, 64, 100, 128, 200, 256};

template <typename Check>
void for_all_sizes(const sl_attention_kernel *kernel, const Check &check) {
  Random random(12);
  for (int64_t row_count = 1; row_count <= SL_ATTENTION_TEAM; ++row_count) {
    for (int64_t channels : kChannels) {
      for (int64_t width : {0, 1, 3, 4, 6, 37}) {
        SCOPED_TRACE(std::to_string(row_count) + " rows " + std::to_string(channels) + " channels " +
                     std::to_string(width) + " keys");
        RowOperands in(random, kernel, row_count, width, channels);
        check(in);
        expect_intact(in.source, in.index, in.rows, in.weights);
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

}  // namespace

TEST_P(Kernel, DotRows) {
  for_all_sizes(kernel, [&](RowOperands &in) {
    int64_t width = in.list.count, stride = width + 5;
    Array scores(SL_F32, in.row_count * stride, kNan);
    kernel->dot_rows(in.rows.floats(), in.stride, in.row_count, &in.list, scores.floats(), stride);
    for (int64_t r = 0; r < in.row_count; ++r) {
      for (int64_t j = 0; j < width; ++j) {
        double want = 0, sizes = 0;
        for (int64_t c = 0; c < in.tokens.channels; ++c) {
          want += in.product(r, c, j), sizes += std::fabs(in.product(r, c, j));
        }
        ASSERT_NEAR(scores.get(r * stride + j), want, 1e-6 * sizes) << "row " << r << " key " << j;
        float alone = sl_attention_dot_row(kernel, in.rows.floats() + r * in.stride, &in.tokens, in.index[j]);
        ASSERT_EQ(scores.get(r * stride + j), static_cast<double>(alone)) << "row " << r << " key " << j;
      }
      for (int64_t j = width; j < stride; ++j) ASSERT_TRUE(std::isnan(scores.get(r * stride + j)));
    }
    expect_intact(scores);
  });
}

TEST_P(Kernel, AddRows) {
  for_all_sizes(kernel, [&](RowOperands &in) {
    int64_t width = in.list.count, weight_stride = width + 5, stride = in.tokens.channels + 2;
    Array out(SL_F32, in.row_count * stride, 0.5), alone(SL_F32, in.row_count * stride, 0.5);
    kernel->add_rows(out.floats(), stride, in.row_count, in.weights.floats(), weight_stride, &in.list);
    for (int64_t r = 0; r < in.row_count; ++r) {
      for (int64_t j = 0; j < width; ++j) {
        float weight = in.weights.floats()[r * weight_stride + j];
        sl_attention_add_row(kernel, alone.floats() + r * stride, weight, &in.tokens, in.index[j]);
      }
      for (int64_t c = 0; c < stride; ++c) {
        double want = 0.5, sizes = 0.5;
        for (int64_t j = 0; j < width && c < in.tokens.channels; ++j) {
          double product = in.weights.get(r * weight_stride + j) * in.source.get(0, 0, in.index[j], c);
          want += product, sizes += std::fabs(product);
        }
        ASSERT_NEAR(out.get(r * stride + c), want, 1e-6 * sizes) << "row " << r << " channel " << c;
        ASSERT_EQ(out.get(r * stride + c), alone.get(r * stride + c)) << "row " << r << " channel " << c;
      }
    }
    expect_intact(out, alone);
  });
}

TEST_P(Kernel, WeighRow) {
  Random random(13);
  for (int64_t count : {1, 2, 7, 8, 15, 16, 31, 100, 1024}) {
    for (int variant = 0; variant < 8; ++variant) {
      bool dropped = variant & 1, huge = variant & 2, ungated = variant & 4;
      int64_t owned = sl_round_up(count, SL_ATTENTION_STRIDE);
      Array scores(SL_F32, owned, kNan), logits(SL_F32, owned, kNan);
      const double scale = static_cast<float>(random.uniform(0.05, 2));
      std::vector<double> score, logit;
      for (int64_t j = 0; j < count; ++j) {
        logits.set(j, ungated ? kInfinity : random.normal(huge ? 30 : 2));
        scores.set(j, random.normal(huge ? 200 : 2));
        if (dropped && random.chance(0.3)) logits.set(j, -kInfinity), scores.set(j, random.pick<double>({kNan, 900}));
        if (dropped && random.chance(0.1)) scores.set(j, logits.get(j) == -kInfinity ? kInfinity : -kInfinity);
        score.push_back(logits.get(j) == -kInfinity ? -kInfinity : scores.get(j)), logit.push_back(logits.get(j));
      }
      SCOPED_TRACE(std::to_string(count) + " pairs, variant " + std::to_string(variant));
      sl_weigh_row row = {count, scores.floats(), logits.floats(), static_cast<float>(scale), 0, 0};
      kernel->weigh_row(&row);
      double top = *std::max_element(score.begin(), score.end()), sum = 0, error = 0;
      ASSERT_EQ(static_cast<double>(row.maximum), top);
      for (size_t j = 0; j < score.size(); ++j) {
        double weight = top == -kInfinity ? 0 : std::exp2(scale * (score[j] - top));
        double near = weight > 0 ? weight * (4e-6 + (std::fabs(top) + std::fabs(score[j])) * scale * 0x1p-22) : 0;
        sum += weight, error += near + 1e-37;
        double gate = 1 / (1 + std::exp(-logit[j]));  // of -inf: 0
        near += std::isinf(logit[j]) ? 0 : weight * std::fabs(logit[j]) * 0x1p-22;
        ASSERT_NEAR(scores.get(static_cast<int64_t>(j)), weight * gate, near * gate + 1e-37) << "pair " << j;
      }
      ASSERT_NEAR(static_cast<double>(row.sum), sum, error + 1e-6 * sum);
      expect_intact(scores, logits);
    }
  }
}

TEST_P(Kernel, WeighRowShowsNanAndInfinity) {
  for (int64_t place : {0, 5, 33}) {
    for (double value : {kNan, kInfinity}) {
      Array scores(SL_F32, 64, 1), logits(SL_F32, 64, 1);
      scores.set(place, value);
      sl_weigh_row row = {40, scores.floats(), logits.floats(), 1, 0, 0};
      kernel->weigh_row(&row);
      EXPECT_TRUE(std::isnan(row.sum)) << value << " at " << place;
    }
    Array scores(SL_F32, 64, 1), logits(SL_F32, 64, 1);
    logits.set(place, kNan);
    sl_weigh_row row = {40, scores.floats(), logits.floats(), 1, 0, 0};
    kernel->weigh_row(&row);
    EXPECT_TRUE(std::isnan(scores.get(place)));
    EXPECT_TRUE(std::isfinite(scores.get(place + 1)));
  }
}

INSTANTIATE_TEST_SUITE_P(Attention, Kernel, all_kernels(), name_of_kernel);

// The micro-ops between the product and the softmax, alone: every table of kernels.def against the formula.
#include "kernel_support.h"

using namespace sluice_test;

TEST_P(Kernel, MaskTile) {
  Random random(7);
  for (const TileSize &size : tile_sizes(kernel)) {
    int64_t padded = round_rows(size.rows), stride = sl_round_up(size.width, SL_ATTENTION_STRIDE);
    for (const auto &steps : staircases(random, size.rows, padded, size.width)) {
      Integers lengths(steps);
      std::vector<int32_t> places(static_cast<size_t>(sl_round_up(size.width, panel))), low, high;
      for (int32_t &place : places) place = static_cast<int32_t>(random.integer(0, 2 * size.width));
      for (int64_t r = 0; r < padded; ++r) {
        low.push_back(static_cast<int32_t>(random.integer(-5, size.width)));
        high.push_back(random.chance(0.1) ? -1 : static_cast<int32_t>(random.integer(0, 2 * size.width)));
      }
      Integers positions(places), lowest(low), highest(high);
      Array scores(SL_F32, padded * stride);
      for (int64_t i = 0; i < scores.count(); ++i) scores.set(i, random.normal());
      std::vector<float> copy(scores.floats(), scores.floats() + scores.count());
      kernel->mask_tile(size.rows, lengths.data(), scores.floats(), stride, positions.data(), lowest.data(),
                        highest.data());
      for (int64_t r = 0; r < size.rows; ++r) {
        for (int64_t j = 0; j < lengths[r]; ++j) {
          bool dropped = positions[j] < lowest[r] || positions[j] > highest[r];
          double want = dropped ? -kInfinity : copy[static_cast<size_t>(r * stride + j)];
          ASSERT_EQ(scores.get(r * stride + j), want) << "row " << r << " key " << j;
        }
      }
      expect_intact(scores, positions, lowest, highest, lengths);
    }
  }
}

TEST_P(Kernel, BendTile) {
  Random random(8);
  for (const TileSize &size : tile_sizes(kernel)) {
    int64_t padded = round_rows(size.rows), stride = sl_round_up(size.width, SL_ATTENTION_STRIDE);
    for (const auto &steps : staircases(random, size.rows, padded, size.width)) {
      for (float softcap : {0.0f, 0.5f, 30.0f}) {
        Integers lengths(steps);
        std::vector<int32_t> places, keys(static_cast<size_t>(sl_round_up(size.width, panel)));
        for (int32_t &key : keys) key = static_cast<int32_t>(random.integer(0, 5000));
        for (int64_t r = 0; r < padded; ++r) places.push_back(static_cast<int32_t>(random.integer(-100, 5000)));
        Integers row_positions(places), key_positions(keys);
        Array scores(SL_F32, padded * stride), mask(SL_F32, padded * stride), bend(SL_F32, padded * stride);
        for (int64_t i = 0; i < scores.count(); ++i) {
          scores.set(i, random.chance(0.05) ? random.pick<double>({kInfinity, -kInfinity, kNan}) : random.normal(20));
          mask.set(i, random.chance(0.1) ? -kInfinity : random.normal());
        }
        std::vector<float> copy(scores.floats(), scores.floats() + scores.count());
        bool masked = random.chance(0.5);
        sl_bend_tile tile = {.rows = size.rows,
                             .lengths = lengths.data(),
                             .scores = scores.floats(),
                             .score_stride = stride,
                             .scale = 0.3f,
                             .softcap = softcap,
                             .slope = random.chance(0.5) ? 0.01f : 0.0f,
                             .row_positions = row_positions.data(),
                             .key_positions = key_positions.data(),
                             .mask = masked ? mask.floats() : nullptr,
                             .bend = softcap > 0 ? bend.floats() : nullptr};
        kernel->bend_tile(&tile);
        for (int64_t r = 0; r < size.rows; ++r) {
          for (int64_t j = 0; j < lengths[r]; ++j) {
            int64_t i = r * stride + j;
            double score = 0.3f * copy[static_cast<size_t>(i)], slope = 1;
            if (softcap > 0) {
              double bent = std::tanh(score / static_cast<double>(softcap));
              slope = 1 - bent * bent, score = static_cast<double>(softcap) * bent;
            }
            score -= static_cast<double>(tile.slope) * std::abs(key_positions[j] - row_positions[r]);
            if (masked) score += mask.get(i);
            double got = scores.get(i);
            if (!std::isfinite(score)) {
              ASSERT_TRUE(std::isnan(score) ? std::isnan(got) : got == score) << score << " became " << got;
            } else {
              ASSERT_NEAR(got, score, 1e-6 * (std::fabs(score) + 60)) << "row " << r << " key " << j;
              if (softcap > 0) {
                ASSERT_NEAR(bend.get(i), slope, 2e-6);
              }
            }
          }
        }
        expect_intact(scores, mask, bend, row_positions, key_positions, lengths);
      }
    }
  }
}

TEST_P(Kernel, TablesWithABackwardHaveFloatElements) {
  if (kernel->softmax_gradient_tile) {
    EXPECT_EQ(kernel->element_size, sizeof(float));
  }
}

INSTANTIATE_TEST_SUITE_P(Attention, Kernel, all_kernels(), name_of_kernel);

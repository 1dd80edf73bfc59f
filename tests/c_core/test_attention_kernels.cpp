// Every micro-op of every table in kernels.def, against its definition in kernel.h computed in double: random tiles,
// odd tails, staircases of every form and extreme values, with canaries around every buffer.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "kernel_support.h"

using namespace sluice_test;

TEST_P(Kernel, NameIsIsaDtypeAndTile) {
  const char *dtype = kernel->dtype == SL_F32 ? "f32" : kernel->dtype == SL_BF16 ? "bf16" : "f16";
  std::string prefix = std::string(sl_isa_name(kernel->isa)) + "_" + dtype + "_";
  EXPECT_EQ(kernel->name, prefix + std::to_string(kernel->row_tile) + "x" + std::to_string(kernel->panel));
  EXPECT_EQ(SL_ATTENTION_STRIDE % kernel->panel, 0);
  EXPECT_TRUE(kernel->depth_step == 1 || kernel->depth_step == 2);
  EXPECT_TRUE(kernel->element_size == 4 || kernel->element_size == 2);
}

TEST_P(Kernel, PackRows) {
  Random random(1);
  for (const TileSize &size : tile_sizes(kernel)) {
    for (double factor : {1., -1., 0.}) {
      Tensor source = random_tokens(random, kernel->dtype, 50, size.channels);
      sl_token_rows tokens = rows_of(source);
      Integers index(random_index(random, size.rows, 50));
      int64_t stride = sl_round_up(size.channels, SL_ATTENTION_STRIDE), padded = round_rows(size.rows);
      Array packed(element, padded * stride, kNan);
      kernel->pack_rows(packed.data(), stride, &tokens, index.data(), size.rows, static_cast<float>(factor));
      for (int64_t r = 0; r < padded; ++r) {
        for (int64_t c = 0; c < stride; ++c) {
          double want = r < size.rows && c < size.channels ? factor * source.get(0, 0, index[r], c) : 0;
          ASSERT_EQ(packed.get(r * stride + c), want) << "row " << r << " channel " << c;
        }
      }
      expect_intact(packed, index, source);
    }
  }
}

TEST_P(Kernel, PackColumns) {
  Random random(2);
  for (const TileSize &size : tile_sizes(kernel)) {
    Tensor source = random_tokens(random, kernel->dtype, 50, size.channels);
    sl_token_rows tokens = rows_of(source);
    Integers index(random_index(random, size.width, 50));
    int64_t depth = sl_round_up(size.channels, step), columns = sl_round_up(size.width, panel);
    Array packed(element, depth * columns, kNan);
    kernel->pack_columns(packed.data(), &tokens, index.data(), size.width);
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t j = 0; j < columns; ++j) {
        double want = j < size.width && d < size.channels ? source.get(0, 0, index[j], d) : 0;
        ASSERT_EQ(packed.get(right_index(depth, d, j)), want) << "depth " << d << " column " << j;
      }
    }
    expect_intact(packed, index, source);
  }
}

TEST_P(Kernel, PackDepths) {
  Random random(3);
  for (const TileSize &size : tile_sizes(kernel)) {
    Tensor source = random_tokens(random, kernel->dtype, 50, size.channels);
    sl_token_rows tokens = rows_of(source);
    Integers index(random_index(random, size.width, 50));
    int64_t depth = sl_round_up(size.width, step), capacity = depth + 4 * step;
    int64_t width = sl_round_up(size.channels, panel);
    Array packed(element, capacity * width, -7);
    kernel->pack_depths(packed.data(), capacity, &tokens, index.data(), size.width);
    for (int64_t t = 0; t < capacity; ++t) {
      for (int64_t c = 0; c < width; ++c) {
        double want = t < size.width && c < size.channels ? source.get(0, 0, index[t], c) : t < depth ? 0 : -7;
        ASSERT_EQ(packed.get(right_index(capacity, t, c)), want) << "token " << t << " channel " << c;
      }
    }
    expect_intact(packed, index, source);
  }
}

TEST_P(Kernel, MultiplyNt) {
  Random random(4);
  for (const TileSize &size : tile_sizes(kernel)) {
    int64_t padded = round_rows(size.rows), depth = sl_round_up(size.channels, step);
    int64_t left_stride = sl_round_up(size.channels, SL_ATTENTION_STRIDE);
    int64_t score_stride = sl_round_up(size.width, SL_ATTENTION_STRIDE), columns_wide = sl_round_up(size.width, panel);
    for (const auto &steps : staircases(random, size.rows, padded, size.width)) {
      Integers lengths(steps);
      Array left(element, padded * left_stride), columns(element, depth * columns_wide);
      for (int64_t r = 0; r < size.rows; ++r) {
        for (int64_t d = 0; d < size.channels; ++d) left.set(r * left_stride + d, random.normal());
      }
      for (int64_t j = 0; j < size.width; ++j) {
        for (int64_t d = 0; d < size.channels; ++d) columns.set(right_index(depth, d, j), random.normal());
      }
      Array scores(SL_F32, padded * score_stride, kNan);
      kernel->multiply_nt(size.rows, lengths.data(), left.data(), left_stride, columns.data(), depth, scores.floats(),
                          score_stride);
      for (int64_t r = 0; r < padded; ++r) {
        for (int64_t j = 0; j < score_stride; ++j) {
          double got = scores.get(r * score_stride + j), want = 0, sizes = 0;
          if (j >= group_width(lengths, r, panel)) {
            ASSERT_TRUE(std::isnan(got)) << "row " << r << " column " << j << " was written";
            continue;
          }
          if (r >= size.rows || j >= group_width(lengths, r, 1)) continue;
          for (int64_t d = 0; d < depth; ++d) {
            double product = left.get(r * left_stride + d) * columns.get(right_index(depth, d, j));
            want += product, sizes += std::fabs(product);
          }
          ASSERT_NEAR(got, want, 1e-6 * sizes) << "row " << r << " column " << j;
        }
      }
      expect_intact(left, columns, scores, lengths);
    }
  }
}

TEST_P(Kernel, MultiplyNn) {
  Random random(5);
  for (const TileSize &size : tile_sizes(kernel)) {
    int64_t padded = round_rows(size.rows), width = sl_round_up(size.channels, panel);
    int64_t left_stride = sl_round_up(size.width, SL_ATTENTION_STRIDE);
    int64_t out_stride = sl_round_up(width, SL_ATTENTION_STRIDE);
    int64_t capacity = sl_round_up(size.width, step) + 2 * step;
    for (const auto &steps : staircases(random, size.rows, padded, size.width)) {
      Integers lengths(steps);
      // Beyond what the group reads, both operands are NaN.
      Array left(element, padded * left_stride, kNan), depths(element, capacity * width, kNan);
      Array out(SL_F32, padded * out_stride, 0.5);
      for (int64_t r = 0; r < padded; ++r) {
        for (int64_t j = 0; j < group_width(lengths, r, panel); ++j) {
          left.set(r * left_stride + j, j < lengths[r] ? random.normal() : 0);
        }
      }
      for (int64_t j = 0; j < sl_round_up(size.width, step); ++j) {
        for (int64_t c = 0; c < width; ++c) {
          depths.set(right_index(capacity, j, c), j < size.width && c < size.channels ? random.normal() : 0);
        }
      }
      kernel->multiply_nn(size.rows, lengths.data(), left.data(), left_stride, depths.data(), capacity, width,
                          out.floats(), out_stride);
      for (int64_t r = 0; r < size.rows; ++r) {
        for (int64_t c = 0; c < out_stride; ++c) {
          double want = 0.5, sizes = 0.5;
          for (int64_t j = 0; j < lengths[r] && c < width; ++j) {
            double product = left.get(r * left_stride + j) * depths.get(right_index(capacity, j, c));
            want += product, sizes += std::fabs(product);
          }
          ASSERT_NEAR(out.get(r * out_stride + c), want, 1e-6 * sizes) << "row " << r << " channel " << c;
        }
      }
      expect_intact(left, depths, out, lengths);
    }
  }
}

TEST_P(Kernel, MultiplyTn) {
  if (!kernel->multiply_tn) GTEST_SKIP() << "forward only";
  Random random(6);
  for (const TileSize &size : tile_sizes(kernel)) {
    int64_t padded = round_rows(size.rows), width = sl_round_up(size.channels, panel);
    int64_t left_stride = sl_round_up(size.width, SL_ATTENTION_STRIDE);
    int64_t out_stride = sl_round_up(width, SL_ATTENTION_STRIDE);
    int64_t capacity = sl_round_up(padded, step) + 2 * step;
    for (const auto &steps : staircases(random, size.rows, padded, size.width)) {
      Integers lengths(steps);
      Array left(element, padded * left_stride, kNan), depths(element, capacity * width, kNan);
      Array out(SL_F32, size.width * out_stride, 0.5);  // no row more than there are keys
      for (int64_t r = 0; r < padded; ++r) {
        for (int64_t j = 0; j < group_width(lengths, r, panel); ++j) {
          left.set(r * left_stride + j, j < lengths[r] ? random.normal() : 0);
        }
        for (int64_t c = 0; c < width; ++c) {
          depths.set(right_index(capacity, r, c), r < size.rows && c < size.channels ? random.normal() : 0);
        }
      }
      kernel->multiply_tn(size.rows, lengths.data(), left.data(), left_stride, depths.data(), capacity, width,
                          out.floats(), out_stride);
      for (int64_t j = 0; j < size.width; ++j) {
        for (int64_t c = 0; c < out_stride; ++c) {
          double want = 0.5, sizes = 0.5;
          for (int64_t r = 0; r < size.rows && lengths[r] > j && c < width; ++r) {
            double product = left.get(r * left_stride + j) * depths.get(right_index(capacity, r, c));
            want += product, sizes += std::fabs(product);
          }
          ASSERT_NEAR(out.get(j * out_stride + c), want, 1e-6 * sizes) << "key " << j << " channel " << c;
        }
      }
      expect_intact(left, depths, out, lengths);
    }
  }
}

namespace {

// Operands of the two softmax micro-ops for one staircase. Beyond its length a row's scores are NaN.
struct SoftmaxOperands {
  SoftmaxOperands(Random &random, const std::vector<int32_t> &steps, int64_t row_count, int64_t width, int64_t panel,
                  bool extreme)
      : rows(row_count),
        padded(static_cast<int64_t>(steps.size())),
        stride(sl_round_up(width, SL_ATTENTION_STRIDE)),
        lengths(steps),
        scores(SL_F32, padded * stride, kNan),
        dout_values(SL_F32, padded * stride, kNan),
        exp_minus_a(SL_F32, padded),
        exp_minus_b(SL_F32, sl_round_up(width, panel), 1) {
    double size = extreme ? 300 : 3;
    auto odds = [&] {
      return std::exp(extreme && random.chance(0.3) ? random.pick<double>({-40, 40}) : random.normal(2));
    };
    for (int64_t r = 0; r < padded; ++r) {
      bool all_dropped = extreme && random.chance(0.15);
      for (int64_t j = 0; j < lengths[r]; ++j) {
        bool dropped = all_dropped || (extreme && random.chance(0.2));
        scores.set(r * stride + j, dropped ? -kInfinity : random.normal(size));
        dout_values.set(r * stride + j, random.normal());
      }
      exp_minus_a.set(r, odds());
    }
    for (int64_t j = 0; j < width; ++j) exp_minus_b.set(j, odds());
  }
  double score(int64_t r, int64_t j) const { return scores.get(r * stride + j); }
  double odds(int64_t r, int64_t j) const { return exp_minus_a.get(r) * exp_minus_b.get(j); }

  int64_t rows, padded, stride;
  Integers lengths;
  Array scores, dout_values, exp_minus_a, exp_minus_b;
};

// How far exp2(difference of two rounded products of this size) may be off, relative to the result.
double exp2_tolerance(double size) { return 4e-6 + size * 0x1p-22; }

std::vector<double> copy_of(const Array &array) {
  std::vector<double> copy(static_cast<size_t>(array.count()));
  for (int64_t i = 0; i < array.count(); ++i) copy[static_cast<size_t>(i)] = array.get(i);
  return copy;
}

}  // namespace

TEST_P(Kernel, SoftmaxTile) {
  Random random(8);
  for (const TileSize &size : tile_sizes(kernel)) {
    for (int variant = 0; variant < 8; ++variant) {
      bool gated = variant & 1, extreme = variant & 2, in_place = (variant & 4) && element == SL_F32;
      for (const auto &steps : staircases(random, size.rows, round_rows(size.rows), size.width)) {
        SoftmaxOperands in(random, steps, size.rows, size.width, panel, extreme);
        int64_t out_width = sl_round_up(size.channels, panel), stride = in.stride;
        int64_t out_stride = sl_round_up(out_width, SL_ATTENTION_STRIDE);
        Array separate(element, in.padded * stride, kNan), maximum(SL_F32, in.padded, -kInfinity);
        Array sum(SL_F32, in.padded), out(SL_F32, in.padded * out_stride);
        for (int64_t r = 0; r < in.padded; ++r) {
          if (random.chance(0.5)) maximum.set(r, random.normal(3)), sum.set(r, random.uniform(1, 9));
          for (int64_t c = 0; c < out_stride; ++c) out.set(r * out_stride + c, random.normal());
        }
        const double scale = static_cast<float>(random.uniform(0.05, 2));
        std::vector<double> score = copy_of(in.scores), maximum_before = copy_of(maximum), sum_before = copy_of(sum);
        std::vector<double> out_before = copy_of(out);
        Array &weights = in_place ? in.scores : separate;
        sl_softmax_tile tile = {in.rows,
                                in.lengths.data(),
                                in.scores.floats(),
                                stride,
                                weights.data(),
                                stride,
                                static_cast<float>(scale),
                                gated ? in.exp_minus_a.floats() : nullptr,
                                in.exp_minus_b.floats(),
                                maximum.floats(),
                                sum.floats(),
                                out.floats(),
                                out_stride,
                                out_width};
        kernel->softmax_tile(&tile);
        for (int64_t r = 0; r < in.rows; ++r) {
          size_t row = static_cast<size_t>(r);
          SCOPED_TRACE("row " + std::to_string(r) + " of length " + std::to_string(in.lengths[r]));
          double top = maximum_before[row];
          auto score_at = [&](int64_t j) { return score[static_cast<size_t>(r * stride + j)]; };
          for (int64_t j = 0; j < in.lengths[r]; ++j) top = std::fmax(top, score_at(j));
          ASSERT_EQ(maximum.get(r), top);
          double shift = top == -kInfinity ? 0 : scale * top;
          double shrink = std::exp2(scale * maximum_before[row] - shift), want_sum = sum_before[row] * shrink;
          double error = want_sum * exp2_tolerance(std::fabs(shift));
          for (int64_t j = 0; j < in.lengths[r]; ++j) {
            double want = std::exp2(scale * score_at(j) - shift);
            double near = want * exp2_tolerance(std::fabs(shift) + (want > 0 ? std::fabs(scale * score_at(j)) : 0));
            want_sum += want, error += near + 1e-37;
            double gate = gated ? 1 / (1 + in.odds(r, j)) : 1;
            ASSERT_NEAR(weights.get(r * stride + j), want * gate, near * gate + want * gate * rounding + 1e-37) << j;
          }
          ASSERT_NEAR(sum.get(r), want_sum, error + 1e-6 * want_sum);
          for (int64_t j = in.lengths[r]; j < group_width(in.lengths, r, step); ++j) {
            ASSERT_EQ(weights.get(r * stride + j), 0) << j;
          }
          for (int64_t c = 0; c < out_stride; ++c) {
            double before = out_before[static_cast<size_t>(r * out_stride + c)];
            double want = c < out_width && in.lengths[r] > 0 ? before * shrink : before;
            if (top == -kInfinity) want = out.get(r * out_stride + c);  // a row that saw nothing: out is not read
            double near = std::fabs(want) * exp2_tolerance(std::fabs(shift)) + 1e-37;
            ASSERT_NEAR(out.get(r * out_stride + c), want, near) << c;
          }
        }
        expect_intact(in.lengths, in.scores, in.exp_minus_a, in.exp_minus_b, separate, maximum, sum, out);
      }
    }
  }
}

TEST_P(Kernel, SoftmaxTileShowsNan) {
  Random random(9);
  SoftmaxOperands in(random, std::vector<int32_t>(static_cast<size_t>(round_rows(2)), 0), 2, 2 * panel, panel, false);
  for (int64_t place : {int64_t{0}, panel - 1, panel + 2}) {
    std::vector<int32_t> steps(static_cast<size_t>(round_rows(2)), 0);
    steps[0] = steps[1] = static_cast<int32_t>(panel + 3);
    SoftmaxOperands operands(random, steps, 2, 2 * panel, panel, false);
    operands.scores.set(place, kNan);
    Array weights(element, operands.padded * operands.stride), maximum(SL_F32, operands.padded, -kInfinity);
    Array sum(SL_F32, operands.padded), out(SL_F32, operands.padded * SL_ATTENTION_STRIDE);
    sl_softmax_tile tile = {2,
                            operands.lengths.data(),
                            operands.scores.floats(),
                            operands.stride,
                            weights.data(),
                            operands.stride,
                            1,
                            nullptr,
                            operands.exp_minus_b.floats(),
                            maximum.floats(),
                            sum.floats(),
                            out.floats(),
                            SL_ATTENTION_STRIDE,
                            panel};
    kernel->softmax_tile(&tile);
    EXPECT_TRUE(std::isnan(sum.get(0))) << place;
    EXPECT_TRUE(std::isfinite(sum.get(1))) << place;
  }
}

TEST_P(Kernel, SoftmaxGradientTile) {
  if (!kernel->softmax_gradient_tile) GTEST_SKIP() << "forward only";
  Random random(10);
  for (const TileSize &size : tile_sizes(kernel)) {
    for (int variant = 0; variant < 8; ++variant) {
      bool gated = variant & 1, extreme = variant & 2, in_place = (variant & 4) && element == SL_F32;
      for (const auto &steps : staircases(random, size.rows, round_rows(size.rows), size.width)) {
        SoftmaxOperands in(random, steps, size.rows, size.width, panel, extreme);
        int64_t stride = in.stride;
        const double scale = static_cast<float>(random.uniform(0.05, 2));
        Array lse(SL_F32, in.padded, -kInfinity), mean(SL_F32, in.padded), da(SL_F32, in.padded, 0.5);
        Array db(SL_F32, sl_round_up(size.width, panel), 0.25);
        Array weights_apart(element, in.padded * stride, kNan), gradient_apart(element, in.padded * stride, kNan);
        for (int64_t r = 0; r < in.rows; ++r) {
          double top = -kInfinity;
          for (int64_t j = 0; j < in.lengths[r]; ++j) top = std::fmax(top, scale * in.score(r, j));
          if (top > -kInfinity && !(extreme && random.chance(0.1))) lse.set(r, top + random.uniform(0, 5));
          mean.set(r, random.normal());
        }
        std::vector<double> score = copy_of(in.scores), dout_value = copy_of(in.dout_values);
        Array &weights = in_place ? in.scores : weights_apart;
        Array &gradient = in_place ? in.dout_values : gradient_apart;
        sl_softmax_gradient_tile tile = {in.rows,
                                         in.lengths.data(),
                                         in.scores.floats(),
                                         in.dout_values.floats(),
                                         stride,
                                         weights.data(),
                                         gradient.data(),
                                         stride,
                                         static_cast<float>(scale),
                                         gated ? in.exp_minus_a.floats() : nullptr,
                                         in.exp_minus_b.floats(),
                                         lse.floats(),
                                         mean.floats(),
                                         da.floats(),
                                         db.floats()};
        kernel->softmax_gradient_tile(&tile);
        std::vector<double> want_db(static_cast<size_t>(size.width), 0.25), error_db(want_db);
        for (int64_t r = 0; r < in.rows; ++r) {
          SCOPED_TRACE("row " + std::to_string(r) + " of length " + std::to_string(in.lengths[r]));
          double want_da = 0.5, error_da = 0.5;
          for (int64_t j = 0; j < in.lengths[r]; ++j) {
            size_t place = static_cast<size_t>(r * stride + j);
            double p = lse.get(r) == -kInfinity ? 0 : std::exp2(scale * score[place] - lse.get(r));
            double e = dout_value[place];
            double odds = gated ? in.odds(r, j) : 0, gate = 1 / (1 + odds), dz = gated ? p * e * gate * (1 - gate) : 0;
            double near = p > 0 ? p * exp2_tolerance(std::fabs(scale * score[place]) + std::fabs(lse.get(r))) : 0;
            double size_ds = p * (std::fabs(gate * e) + std::fabs(mean.get(r))), relative = near / (p > 0 ? p : 1);
            ASSERT_NEAR(weights.get(r * stride + j), p * gate, near * gate + p * gate * rounding + 1e-37) << j;
            ASSERT_NEAR(gradient.get(r * stride + j), p * (gate * e - mean.get(r)),
                        size_ds * (relative + rounding) + 1e-37)
                << j;
            want_da += dz, error_da += std::fabs(dz) * (1 + relative * 1e6);
            want_db[static_cast<size_t>(j)] += dz;
            error_db[static_cast<size_t>(j)] += std::fabs(dz) * (1 + relative * 1e6);
          }
          ASSERT_NEAR(da.get(r), want_da, 1e-6 * error_da);
          for (int64_t j = in.lengths[r]; j < group_width(in.lengths, r, panel); ++j) {
            ASSERT_EQ(weights.get(r * stride + j), 0) << j;
            ASSERT_EQ(gradient.get(r * stride + j), 0) << j;
          }
        }
        for (int64_t j = 0; j < size.width; ++j) {
          size_t key = static_cast<size_t>(j);
          ASSERT_NEAR(db.get(j), want_db[key], 1e-6 * error_db[key]) << "key " << j;
        }
        expect_intact(in.lengths, in.scores, in.dout_values, in.exp_minus_a, in.exp_minus_b, lse, mean, da, db,
                      weights_apart, gradient_apart);
      }
    }
  }
}

TEST_P(Kernel, StoreRows) {
  Random random(11);
  for (const TileSize &size : tile_sizes(kernel)) {
    int64_t stride = sl_round_up(size.channels, SL_ATTENTION_STRIDE);
    Tensor target(kernel->dtype, {1, 1, size.rows + 3, size.channels}, Layout::kPadded);
    std::vector<int32_t> order(static_cast<size_t>(size.rows + 3));
    std::iota(order.begin(), order.end(), 0);
    std::reverse(order.begin(), order.end());
    order.resize(static_cast<size_t>(size.rows));
    Integers index(order);
    Array out(SL_F32, round_rows(size.rows) * stride), factors(SL_F32, round_rows(size.rows));
    for (int64_t i = 0; i < out.count(); ++i) out.set(i, random.normal() * std::exp2(random.integer(-12, 12)));
    for (int64_t r = 0; r < size.rows; ++r) factors.set(r, random.uniform(0.1, 2));
    out.set(0, kInfinity);
    out.set(1, kNan);
    kernel->store_rows(target.data(), target.view4().token_stride, size.channels, index.data(), size.rows, out.floats(),
                       stride, factors.floats());
    for (int64_t r = 0; r < size.rows; ++r) {
      for (int64_t c = 0; c < size.channels; ++c) {
        double want = 0;
        float product = factors.floats()[r] * out.floats()[r * stride + c];
        store_number(kernel->dtype, &want, 0, product);
        double rounded = load_number(kernel->dtype, &want, 0), got = target.get(0, 0, index[r], c);
        ASSERT_TRUE(std::isnan(rounded) ? std::isnan(got) : got == rounded) << got << " for " << rounded;
      }
    }
    const unsigned char *bytes = static_cast<const unsigned char *>(target.data());
    for (int64_t t = 0; t < 3; ++t) {  // tokens that are not in the index stay
      size_t start = static_cast<size_t>(target.index(0, 0, t)) * sl_dtype_size(kernel->dtype);
      EXPECT_EQ(bytes[start], GuardedBuffer::kCanary);
    }
    expect_intact(target, out, factors, index);
  }
}

TEST(KernelList, BestTierFirstAndAScalarTableForEveryDtype) {
  for (sl_dtype dtype : {SL_F32, SL_BF16, SL_F16}) {
    const sl_attention_kernel *scalar = sl_attention_find_kernel(dtype, SL_ISA_SCALAR);
    ASSERT_NE(scalar, nullptr);
    EXPECT_EQ(scalar->isa, SL_ISA_SCALAR);
    int isa = SL_ISA_AVX512BF16;
    for (int i = 0; sl_attention_list_kernels(i); ++i) {
      const sl_attention_kernel *kernel = sl_attention_list_kernels(i);
      if (kernel->dtype != dtype) continue;
      EXPECT_LE(kernel->isa, isa) << kernel->name;
      isa = kernel->isa;
      EXPECT_EQ(sl_attention_find_kernel(dtype, kernel->isa)->isa, kernel->isa);
    }
  }
  EXPECT_EQ(sl_attention_find_kernel(SL_F64, SL_ISA_AVX512BF16), nullptr);
  EXPECT_EQ(sl_attention_list_kernels(-1), nullptr);
}

INSTANTIATE_TEST_SUITE_P(Attention, Kernel, all_kernels(), name_of_kernel);

// What the tests of micro-op tables share: arrays between canaries, staircases, tile sizes, and the fixture that runs a
// test on every table of kernels.def.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "support.h"

extern "C" {
#include "attention/kernel.h"
}

namespace sluice_test {

const double kInfinity = std::numeric_limits<double>::infinity();
const double kNan = std::numeric_limits<double>::quiet_NaN();

// Numbers of one type between canaries: float, int32_t, or a table's packed element.
class Array {
 public:
  Array(sl_dtype type, int64_t count, double value = 0)
      : type_(type), count_(count), buffer_(static_cast<size_t>(count) * sl_dtype_size(type)) {
    for (int64_t i = 0; i < count; ++i) set(i, value);
  }
  double get(int64_t i) const { return load_number(type_, buffer_.data(), i); }
  void set(int64_t i, double value) { store_number(type_, buffer_.data(), i, value); }
  float *floats() const { return static_cast<float *>(buffer_.data()); }
  void *data() const { return buffer_.data(); }
  int64_t count() const { return count_; }
  bool intact() const { return buffer_.intact(); }

 private:
  sl_dtype type_;
  int64_t count_;
  GuardedBuffer buffer_;
};

class Integers {
 public:
  explicit Integers(const std::vector<int32_t> &values) : values_(values), buffer_(values.size() * 4) {
    if (!values.empty()) std::memcpy(buffer_.data(), values.data(), values.size() * 4);
  }
  const int32_t *data() const { return static_cast<const int32_t *>(buffer_.data()); }
  int32_t operator[](int64_t i) const { return data()[i]; }
  bool intact() const {
    return buffer_.intact() && (values_.empty() || !std::memcmp(buffer_.data(), values_.data(), values_.size() * 4));
  }

 private:
  std::vector<int32_t> values_;
  GuardedBuffer buffer_;
};

template <typename... Buffers>
void expect_intact(const Buffers &...buffers) {
  int place = 0;
  auto expect = [&](const auto &buffer) {
    EXPECT_TRUE(buffer.intact()) << "buffer " << place;
    ++place;
  };
  (expect(buffers), ...);
}

class Kernel : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    kernel = sl_attention_list_kernels(GetParam());
    if (kernel->isa > sl_cpu_detect()) GTEST_SKIP() << "this processor has no " << sl_isa_name(kernel->isa);
    element = kernel->element_size == 2 ? SL_BF16 : SL_F32;
    panel = kernel->panel, step = kernel->depth_step;
    // Each packed element is exact or rounded once; sums are in float.
    rounding = element == SL_BF16 ? 0x1p-8 : 0x1p-24;
  }
  int64_t round_rows(int64_t rows) const { return sl_round_up(rows, kernel->row_tile); }

  // Where (depth d, column j) lies in a packed right operand whose panels have `depth` places.
  int64_t right_index(int64_t depth, int64_t d, int64_t j) const {
    int64_t within = step == 1 ? d * panel + j % panel : (d / 2 * panel + j % panel) * 2 + d % 2;
    return j / panel * depth * panel + within;
  }
  int64_t group_width(const Integers &lengths, int64_t row, int64_t multiple) const {
    return sl_round_up(lengths[row / kernel->row_tile * kernel->row_tile], multiple);
  }

  const sl_attention_kernel *kernel = nullptr;
  sl_dtype element = SL_F32;
  int64_t panel = 0, step = 1;
  double rounding = 0;
};

// Staircases: [rows, padded to whole groups] lengths that never increase and are at most width.
inline std::vector<std::vector<int32_t>> staircases(Random &random, int64_t rows, int64_t padded, int64_t width) {
  std::vector<std::vector<int32_t>> all(4, std::vector<int32_t>(static_cast<size_t>(padded), 0));
  for (int64_t r = 0; r < rows; ++r) {
    size_t i = static_cast<size_t>(r);
    all[0][i] = static_cast<int32_t>(width);                                // dense
    all[1][i] = static_cast<int32_t>(random.integer(0, width));             // random
    all[2][i] = r == 0 ? static_cast<int32_t>(width) : 0;                   // one row
    all[3][i] = static_cast<int32_t>(std::max<int64_t>(0, width - 2 * r));  // steps
  }
  std::sort(all[1].begin(), all[1].begin() + rows, std::greater<>());
  return all;
}

struct TileSize {
  int64_t rows, width, channels;
};

inline std::vector<TileSize> tile_sizes(const sl_attention_kernel *kernel) {
  int64_t panel = kernel->panel, tile = kernel->row_tile;
  return {{1, 1, 1},
          {tile - 1, panel - 1, panel + 1},
          {tile, panel, panel},
          {2 * tile + 1, 2 * panel + 3, 40},
          {33, 64, 64},
          {3, 128, 100},
          {64, 61, 17}};
}

inline sl_token_rows rows_of(const Tensor &tensor) {
  return {tensor.data(), tensor.view4().token_stride, tensor.shape()[3]};
}

inline Tensor random_tokens(Random &random, sl_dtype dtype, int64_t tokens, int64_t channels) {
  Tensor tensor(dtype, {1, 1, tokens, channels}, Layout::kPadded);
  tensor.fill([&] { return random.normal(); });
  return tensor;
}

inline std::vector<int32_t> random_index(Random &random, int64_t count, int64_t tokens) {
  std::vector<int32_t> index(static_cast<size_t>(count));
  for (int32_t &i : index) i = static_cast<int32_t>(random.integer(0, tokens - 1));
  return index;
}

// For INSTANTIATE_TEST_SUITE_P: every table of kernels.def, by its name.
inline auto all_kernels() {
  int count = 0;
  while (sl_attention_list_kernels(count)) ++count;
  return testing::Range(0, count);
}
inline std::string name_of_kernel(const testing::TestParamInfo<int> &table) {
  return sl_attention_list_kernels(table.param)->name;
}

}  // namespace sluice_test

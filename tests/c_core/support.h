// What the C tests share: guarded memory, strided tensors of every dtype, a threaded executor, attention problems.
#ifndef SLUICE_TESTS_SUPPORT_H
#define SLUICE_TESTS_SUPPORT_H

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <sluice/cpu.h>
#include <sluice/executor.h>
#include <sluice/gated_attention.h>

extern "C" {
#include "runtime/number.h"
}

namespace sluice_test {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
  double normal(double deviation = 1) { return std::normal_distribution<double>(0, deviation)(engine_); }
  bool chance(double probability) { return uniform(0, 1) < probability; }
  template <typename T>
  T pick(const std::vector<T> &choices) {
    return choices[static_cast<size_t>(integer(0, static_cast<int64_t>(choices.size()) - 1))];
  }

 private:
  std::mt19937_64 engine_;
};

// 64-byte aligned memory (plus shift) between two canaries. Fresh memory holds the canary byte too: as a float it is
// a small odd number, so a kernel that reads what it should not have is off, and what was not written is recognised.
class GuardedBuffer {
 public:
  static constexpr unsigned char kCanary = 0xa5;
  static constexpr size_t kGuard = 128;

  explicit GuardedBuffer(size_t bytes = 0, size_t shift = 0) : bytes_(bytes), shift_(shift) {
    size_t total = (kGuard + shift + bytes + kGuard + 63) / 64 * 64;
    memory_.reset(static_cast<unsigned char *>(std::aligned_alloc(64, total)));
    total_ = total;
    std::memset(memory_.get(), kCanary, total);
  }
  void *data() const { return memory_.get() + kGuard + shift_; }
  size_t size() const { return bytes_; }
  bool intact() const {
    for (size_t i = 0; i < total_; ++i) {
      bool outside = i < kGuard + shift_ || i >= kGuard + shift_ + bytes_;
      if (outside && memory_.get()[i] != kCanary) return false;
    }
    return true;
  }

 private:
  struct Free {
    void operator()(void *memory) const { std::free(memory); }
  };
  std::unique_ptr<unsigned char, Free> memory_;
  size_t bytes_, shift_, total_ = 0;
};

inline double load_number(sl_dtype dtype, const void *data, int64_t index) {
  switch (dtype) {
    case SL_F32: return static_cast<const float *>(data)[index];
    case SL_F64: return static_cast<const double *>(data)[index];
    case SL_BF16: return sl_bf16_to_float(static_cast<const uint16_t *>(data)[index]);
    case SL_F16: return sl_f16_to_float(static_cast<const uint16_t *>(data)[index]);
    case SL_BOOL: return static_cast<const uint8_t *>(data)[index];
    default: return 0;
  }
}

inline void store_number(sl_dtype dtype, void *data, int64_t index, double value) {
  float single = static_cast<float>(value);
  switch (dtype) {
    case SL_F32: static_cast<float *>(data)[index] = single; break;
    case SL_F64: static_cast<double *>(data)[index] = value; break;
    case SL_BF16: static_cast<uint16_t *>(data)[index] = sl_float_to_bf16(single); break;
    case SL_F16: static_cast<uint16_t *>(data)[index] = sl_float_to_f16(single); break;
    case SL_BOOL: static_cast<uint8_t *>(data)[index] = value != 0; break;
    default: break;
  }
}

enum class Layout {
  kDense,       // [batch, head, token, channel]
  kTokenMajor,  // [batch, token, head, channel]: what a transposed projection gives
  kPadded,      // dense, with unused elements after each token, and an odd start address
};

// [batch, head, token, channel] with strides; a tensor of gates or lse has one channel.
class Tensor {
 public:
  Tensor() : Tensor(SL_F32, {0, 0, 0, 0}) {}
  Tensor(sl_dtype dtype, std::array<int64_t, 4> shape, Layout layout = Layout::kDense) : dtype_(dtype), shape_(shape) {
    auto [batch, heads, tokens, channels] = shape;
    int64_t row = channels + (layout == Layout::kPadded ? 3 : 0);
    stride_ = {heads * tokens * row, tokens * row, row};
    if (layout == Layout::kTokenMajor) stride_ = {heads * tokens * row, row, heads * row};
    elements_ = batch * heads * tokens * row;
    size_t size = sl_dtype_size(dtype);
    buffer_ = GuardedBuffer(static_cast<size_t>(elements_) * size, layout == Layout::kPadded ? size : 0);
  }
  const std::array<int64_t, 4> &shape() const { return shape_; }
  sl_dtype dtype() const { return dtype_; }
  void *data() const { return buffer_.data(); }
  int64_t index(int64_t batch, int64_t head, int64_t token, int64_t channel = 0) const {
    return batch * stride_[0] + head * stride_[1] + token * stride_[2] + channel;
  }
  double get(int64_t batch, int64_t head, int64_t token, int64_t channel = 0) const {
    return load_number(dtype_, buffer_.data(), index(batch, head, token, channel));
  }
  void set(int64_t batch, int64_t head, int64_t token, int64_t channel, double value) {
    store_number(dtype_, buffer_.data(), index(batch, head, token, channel), value);
  }
  // Calls function(batch, head, token, channel) for every element.
  template <typename Function>
  void for_each(Function function) const {
    for (int64_t i = 0; i < shape_[0]; ++i) {
      for (int64_t j = 0; j < shape_[1]; ++j) {
        for (int64_t t = 0; t < shape_[2]; ++t) {
          for (int64_t c = 0; c < shape_[3]; ++c) function(i, j, t, c);
        }
      }
    }
  }
  void fill(const std::function<double()> &next) {
    for_each([&](int64_t i, int64_t j, int64_t t, int64_t c) { set(i, j, t, c, next()); });
  }
  // All values in [batch, head, token, channel] order.
  std::vector<double> values() const {
    std::vector<double> all;
    for_each([&](int64_t i, int64_t j, int64_t t, int64_t c) { all.push_back(get(i, j, t, c)); });
    return all;
  }
  sl_tensor4 view4() const { return {buffer_.data(), stride_[0], stride_[1], stride_[2]}; }
  sl_tensor3 view3() const { return {buffer_.data(), stride_[0], stride_[1], stride_[2]}; }

  // True when the canaries around and the unused elements between the rows were not written.
  bool intact() const {
    if (!buffer_.intact()) return false;
    std::vector<bool> used(static_cast<size_t>(elements_), false);
    for_each([&](int64_t i, int64_t j, int64_t t, int64_t c) { used[static_cast<size_t>(index(i, j, t, c))] = true; });
    size_t size = sl_dtype_size(dtype_);
    const unsigned char *bytes = static_cast<const unsigned char *>(buffer_.data());
    for (size_t i = 0; i < used.size() * size; ++i) {
      if (!used[i / size] && bytes[i] != GuardedBuffer::kCanary) return false;
    }
    return true;
  }

 private:
  sl_dtype dtype_;
  std::array<int64_t, 4> shape_;
  std::array<int64_t, 3> stride_;
  int64_t elements_ = 0;
  GuardedBuffer buffer_;
};

// Runs the ranges of a parallel_for on threads of its own, in an order that is up to the scheduler.
class ThreadExecutor {
 public:
  explicit ThreadExecutor(int threads) : executor_{run, this, threads} {}
  ThreadExecutor(const ThreadExecutor &) = delete;
  const sl_executor *get() const { return &executor_; }

 private:
  static void run(void *self, int64_t count, sl_range_function function, void *context) {
    int64_t threads = static_cast<ThreadExecutor *>(self)->executor_.threads;
    std::vector<std::thread> running;
    for (int64_t i = 0; i < threads; ++i) {
      int64_t begin = count * i / threads, end = count * (i + 1) / threads;
      if (begin < end) running.emplace_back(function, context, begin, end);
    }
    for (std::thread &thread : running) thread.join();
  }
  sl_executor executor_;
};

// What only the order of threads could break is the same for every element type and in every round of random input.
#if defined(__SANITIZE_THREAD__)
const bool kUnderThreadSanitizer = true;
#else
const bool kUnderThreadSanitizer = false;
#endif

// Caps the tier for the life of the object.
class IsaCap {
 public:
  explicit IsaCap(sl_isa isa) { sl_cpu_cap(isa); }
  ~IsaCap() { sl_cpu_cap(sl_cpu_detect()); }
};

struct AttentionShape {
  sl_dtype dtype = SL_F32;
  int64_t batch = 1, heads_q = 1, heads_kv = 1, n_q = 4, n_k = 4, head_dim = 8, head_dim_v = 8;
  bool causal = false;
  int64_t window = 0, sinks = 0;
  double scale = 0.5;
  std::optional<double> logit_tau;  // every head gets this threshold; none: tau = 0
  std::vector<int64_t> key_range;   // [batch, 2]; empty: all keys
  std::vector<int64_t> q_offset;    // [batch]; empty: the queries are the last tokens
  std::vector<int64_t> text_begin;  // [batch]; empty: the text begins with the first valid key
  bool lse_gradient = false;        // whether there is a gradient to lse
  Layout layout = Layout::kDense;
  int64_t sliding_window = 0;
  double softcap = 0;
  bool alibi = false;
  int64_t output_gate = 0;  // channels: 1 or head_dim_v; 0: none
  double dropout = 0;
  std::optional<sl_dtype> mask;  // numbers or booleans, some of them -inf or false; none: no mask
  std::array<bool, 4> mask_is_broadcast = {false, false, false, false};  // over batch, heads, queries, keys

  std::string text() const {
    std::ostringstream out;
    out << sl_dtype_name(dtype) << " B=" << batch << " H=" << heads_q << "/" << heads_kv << " n=" << n_q << "x" << n_k
        << " D=" << head_dim << "/" << head_dim_v << (causal ? " causal" : " full") << " window=" << window
        << " sinks=" << sinks << " layout=" << static_cast<int>(layout) << " logit_tau=";
    if (logit_tau) out << *logit_tau;
    for (int64_t bound : key_range) out << " range " << bound;
    for (int64_t offset : q_offset) out << " offset " << offset;
    for (int64_t begin : text_begin) out << " text from " << begin;
    if (lse_gradient) out << " dlse";
    if (sliding_window) out << " sliding_window=" << sliding_window;
    if (softcap > 0) out << " softcap=" << softcap;
    if (alibi) out << " alibi";
    if (output_gate) out << " output_gate=" << output_gate;
    if (dropout > 0) out << " dropout=" << dropout;
    if (mask) out << " mask " << sl_dtype_name(*mask) << " broadcast";
    for (int i = 0; mask && i < 4; ++i) out << " " << mask_is_broadcast[static_cast<size_t>(i)];
    return out.str();
  }

  // Now and then: queries anywhere among the keys, texts whose first tokens are not among them, a gradient to lse.
  // Takes a copy of the generator, so that what is drawn afterwards does not depend on it.
  void place_at_random(Random random) {
    if (n_q <= n_k && random.chance(0.4)) {
      for (int64_t i = 0; i < batch; ++i) q_offset.push_back(random.integer(0, n_k - n_q));
    }
    if (random.chance(0.3)) {
      for (int64_t i = 0; i < batch; ++i) {
        int64_t begin = key_range.empty() ? 0 : key_range[static_cast<size_t>(2 * i)];
        text_begin.push_back(begin - random.pick<int64_t>({0, 1, random.integer(0, 80), int64_t{1} << 30}));
      }
    }
    lse_gradient = random.chance(0.5);
  }

  // Now and then: a mask, a cap, a slope, a window that cuts, a gate on the output, dropout.
  void bend_at_random(Random random) {
    if (random.chance(0.25)) sliding_window = random.pick<int64_t>({1, 3, 17, 90, 300, int64_t{1} << 40});
    if (random.chance(0.25)) softcap = random.pick<double>({0.5, 3, 50});
    alibi = random.chance(0.25);
    if (random.chance(0.3)) output_gate = random.pick<int64_t>({1, head_dim_v});
    if (random.chance(0.2)) dropout = random.pick<double>({0.1, 0.6});
    if (random.chance(0.4)) mask = random.pick<sl_dtype>({SL_F32, SL_BOOL, SL_BF16, SL_F16, SL_F64});
    for (bool &broadcast : mask_is_broadcast) broadcast = random.chance(0.4);
  }
};

// Operands, results and args of one call; inputs are random, dout included.
class AttentionProblem {
 public:
  AttentionProblem(const AttentionShape &shape, uint64_t seed, double gate_deviation = 2) : shape_(shape) {
    Random random(seed);
    sl_dtype gate = gate_dtype();
    int64_t B = shape.batch, Hq = shape.heads_q, Hkv = shape.heads_kv, D = shape.head_dim, Dv = shape.head_dim_v;
    auto inputs = [&](int64_t heads, int64_t tokens, int64_t channels) {
      Tensor tensor(shape.dtype, {B, heads, tokens, channels}, shape.layout);
      tensor.fill([&] { return random.normal(); });
      return tensor;
    };
    auto gates = [&](int64_t heads, int64_t tokens) {
      Tensor tensor(gate, {B, heads, tokens, 1}, shape.layout);
      tensor.fill([&] { return random.normal(gate_deviation); });
      return tensor;
    };
    q = inputs(Hq, shape.n_q, D), k = inputs(Hkv, shape.n_k, D), v = inputs(Hkv, shape.n_k, Dv);
    a = gates(Hq, shape.n_q), b = gates(Hkv, shape.n_k);
    dout = inputs(Hq, shape.n_q, Dv), dlse = gates(Hq, shape.n_q);
    if (shape.logit_tau) {
      logit_tau = Tensor(gate, {B, Hq, 1, 1});
      logit_tau.fill([&] { return *shape.logit_tau; });
    }
    if (shape.alibi) {
      alibi_slopes = Tensor(gate, {B, Hq, 1, 1});
      alibi_slopes.fill([&] { return random.uniform(0, 0.5); });
    }
    if (shape.output_gate) output_gate = inputs(Hq, shape.n_q, shape.output_gate);
    if (shape.mask) {
      mask = Tensor(*shape.mask, mask_shape());
      bool is_bool = *shape.mask == SL_BOOL;
      mask.fill([&] {
        bool shut = random.chance(0.2);
        return is_bool ? !shut : shut ? -std::numeric_limits<double>::infinity() : random.normal();
      });
    }
    clear_results();
  }

  std::array<int64_t, 4> mask_shape() const {
    std::array<int64_t, 4> sizes = {shape_.batch, shape_.heads_q, shape_.n_q, shape_.n_k};
    for (size_t i = 0; i < 4; ++i) {
      if (shape_.mask_is_broadcast[i]) sizes[i] = 1;
    }
    return sizes;
  }
  double pairs() const { return static_cast<double>(shape_.batch * shape_.heads_q * shape_.n_q * shape_.n_k); }
  // Of mask or dmask; its channels are keys.
  sl_attention_mask view_mask(const Tensor &tensor) const {
    sl_tensor4 view = tensor.view4();
    const std::array<bool, 4> &fixed = shape_.mask_is_broadcast;
    return {view.data,
            tensor.dtype(),
            fixed[0] ? 0 : view.batch_stride,
            fixed[1] ? 0 : view.head_stride,
            fixed[2] ? 0 : view.token_stride,
            fixed[3] ? 0 : 1};
  }

  // Fresh results, full of canaries.
  void clear_results() {
    out = Tensor(shape_.dtype, {shape_.batch, shape_.heads_q, shape_.n_q, shape_.head_dim_v}, shape_.layout);
    lse = Tensor(gate_dtype(), {shape_.batch, shape_.heads_q, shape_.n_q, 1}, shape_.layout);
    kept = Tensor(SL_I32, {shape_.batch, shape_.heads_q, shape_.n_q, 1});
    clear_gradients();
  }
  void clear_gradients() {
    int64_t B = shape_.batch, Hq = shape_.heads_q, Hkv = shape_.heads_kv, Nq = shape_.n_q, Nk = shape_.n_k;
    dq = Tensor(shape_.dtype, {B, Hq, Nq, shape_.head_dim}, shape_.layout);
    dk = Tensor(shape_.dtype, {B, Hkv, Nk, shape_.head_dim}, shape_.layout);
    dv = Tensor(shape_.dtype, {B, Hkv, Nk, shape_.head_dim_v}, shape_.layout);
    da = Tensor(gate_dtype(), {B, Hq, Nq, 1}, shape_.layout);
    db = Tensor(gate_dtype(), {B, Hkv, Nk, 1}, shape_.layout);
    if (shape_.output_gate) doutput_gate = Tensor(shape_.dtype, {B, Hq, Nq, shape_.output_gate}, shape_.layout);
    if (has_mask_gradient()) dmask = Tensor(gate_dtype(), mask_shape());
  }
  bool has_mask_gradient() const { return shape_.mask && *shape_.mask != SL_BOOL; }

  sl_dtype gate_dtype() const { return shape_.dtype == SL_F64 ? SL_F64 : SL_F32; }
  const AttentionShape &shape() const { return shape_; }

  sl_gated_attention_args args(const sl_executor *executor = nullptr) const {
    sl_gated_attention_args args{};
    args.dtype = shape_.dtype;
    args.batch = shape_.batch, args.heads_q = shape_.heads_q, args.heads_kv = shape_.heads_kv;
    args.n_q = shape_.n_q, args.n_k = shape_.n_k;
    args.head_dim = shape_.head_dim, args.head_dim_v = shape_.head_dim_v;
    args.q = q.view4(), args.k = k.view4(), args.v = v.view4(), args.a = a.view3(), args.b = b.view3();
    args.logit_tau = shape_.logit_tau ? logit_tau.data() : nullptr;
    args.key_range = shape_.key_range.empty() ? nullptr : shape_.key_range.data();
    args.q_offset = shape_.q_offset.empty() ? nullptr : shape_.q_offset.data();
    args.text_begin = shape_.text_begin.empty() ? nullptr : shape_.text_begin.data();
    if (shape_.mask) args.attn_mask = view_mask(mask);
    if (has_mask_gradient()) args.dattn_mask = view_mask(dmask);
    args.alibi_slopes = shape_.alibi ? alibi_slopes.data() : nullptr;
    if (shape_.output_gate) args.output_gate = output_gate.view4(), args.doutput_gate = doutput_gate.view4();
    args.output_gate_channels = shape_.output_gate;
    args.dropout_p = shape_.dropout, args.dropout_seed = &dropout_seed;
    args.softcap = shape_.softcap, args.sliding_window = shape_.sliding_window;
    args.causal = shape_.causal, args.window = shape_.window, args.sinks = shape_.sinks, args.scale = shape_.scale;
    args.out = out.view4(), args.lse = lse.view3(), args.kept = kept.data();
    if (shape_.lse_gradient) args.dlse = dlse.view3();
    args.dout = dout.view4(), args.dq = dq.view4(), args.dk = dk.view4(), args.dv = dv.view4();
    args.da = da.view3(), args.db = db.view3();
    args.executor = executor;
    return args;
  }

  // The public entry with exactly the workspace that it asks for, between canaries.
  sl_status run_forward(const sl_executor *executor = nullptr) {
    return run(executor, sl_gated_attention_workspace_size, sl_gated_attention);
  }
  sl_status run_backward(const sl_executor *executor = nullptr) {
    return run(executor, sl_gated_attention_backward_workspace_size, sl_gated_attention_backward);
  }

  // Names what was written that should not have been; empty when all is well.
  std::string damage() const {
    std::string names;
    if (!workspace_intact_) names += " workspace";
    const std::pair<const char *, const Tensor *> all[] = {{"q", &q},
                                                           {"k", &k},
                                                           {"v", &v},
                                                           {"a", &a},
                                                           {"b", &b},
                                                           {"logit_tau", &logit_tau},
                                                           {"out", &out},
                                                           {"lse", &lse},
                                                           {"kept", &kept},
                                                           {"dout", &dout},
                                                           {"dlse", &dlse},
                                                           {"dq", &dq},
                                                           {"dk", &dk},
                                                           {"dv", &dv},
                                                           {"da", &da},
                                                           {"db", &db},
                                                           {"mask", &mask},
                                                           {"dmask", &dmask},
                                                           {"output_gate", &output_gate},
                                                           {"doutput_gate", &doutput_gate}};
    for (auto &[name, tensor] : all) {
      if (!tensor->intact()) names += std::string(" ") + name;
    }
    return names;
  }

  Tensor q, k, v, a, b, logit_tau, alibi_slopes, mask, output_gate, out, lse, kept, dout, dlse, dq, dk, dv, da, db,
      dmask, doutput_gate;
  int64_t dropout_seed = 77;

 private:
  sl_status run(const sl_executor *executor, sl_status (*measure)(const sl_gated_attention_args *, size_t *),
                sl_status (*call)(const sl_gated_attention_args *)) {
    sl_gated_attention_args args = this->args(executor);
    size_t bytes = 0;
    if (sl_status status = measure(&args, &bytes); status != SL_OK) return status;
    GuardedBuffer workspace(bytes);
    if (bytes) std::memset(workspace.data(), 0xff, bytes);  // NaN, whatever it is read as
    args.workspace = workspace.data(), args.workspace_size = bytes;
    sl_status status = call(&args);
    workspace_intact_ = workspace_intact_ && workspace.intact();
    return status;
  }

  AttentionShape shape_;
  bool workspace_intact_ = true;
};

// Largest difference over the largest wanted value, and the root mean square of each; NaN and infinity must coincide.
// Values are seen as at least `least` in size: what cancels to nothing is compared with the terms that cancelled.
struct Distance {
  double relative_maximum = 0, relative_rms = 0;
  bool same_specials = true;
};

inline Distance measure_distance(const std::vector<double> &got, const std::vector<double> &want, double least = 0) {
  Distance result;
  double largest = 0, difference = 0, squares = 0, wanted_squares = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (!std::isfinite(want[i]) || !std::isfinite(got[i])) {
      bool same = std::isnan(want[i]) ? std::isnan(got[i]) : got[i] == want[i];
      result.same_specials = result.same_specials && same;
      continue;
    }
    largest = std::fmax(largest, std::fabs(want[i]));
    difference = std::fmax(difference, std::fabs(got[i] - want[i]));
    squares += (got[i] - want[i]) * (got[i] - want[i]);
    wanted_squares += want[i] * want[i];
  }
  double least_squares = least * least * static_cast<double>(want.size());
  if (difference > 0) result.relative_maximum = difference / std::fmax(largest, least);
  if (squares > 0) result.relative_rms = std::sqrt(squares / std::fmax(wanted_squares, least_squares));
  return result;
}

}  // namespace sluice_test

#endif

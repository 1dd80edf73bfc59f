/* quantize: input-adaptive quantisation. Activations are rounded to 4, 7, 8 or 16 bits when they arrive, a width for
 * each row or tensor, and multiplied by weights that were packed once in 8 or 4 bits.
 *
 * ROUNDING is symmetric, to nearest even. With amax = max |x| over a row (or the tensor, or an image):
 *   qmax  = 7, 63, 127, 32639 for 4, 7, 8, 16 bits           32639 = 127 * 256 + 127: two bytes of at most 127 each
 *   scale = amax / qmax
 *   q     = clamp(round(x * (qmax / amax)), -qmax, qmax)     all in float32
 * amax < 2^-110: scale and q are 0. A row that holds an infinity or NaN has scale NaN and q 0: every product with it is
 * NaN, as in floating point, and the other rows are as if it weren't there.
 *
 * WIDTH (activation_bits):
 *   4, 7, 8, 16         that. (With 8-bit weights 7 bits are what AVX2 multiplies fastest: two products of a byte in
 *                       1 .. 255 and one in -63 .. 63 fit into 16 bits.)
 *   SL_BITS_BY_SQNR, 0  the smallest whose predicted signal-to-noise ratio is at least target_sqnr, in dB; else 16:
 *                         10 log10(12 qmax^2 / crest^2),  crest = amax / rms
 *                       Rounding makes an error of variance scale^2 / 12 if all fractions are equally likely (Bennett,
 *                       Spectra of quantized signals, 1948). An all-zero row takes 4.
 *   SL_BITS_BY_AMAX, -1 8 if amax < 0.1, else 16. (This rule is customary with x.round() / 256 or / 65536 in place of a
 *                       scale, which turns all that is below one half to zero.)
 *
 * WEIGHTS [out_features, in_features] in 8 bits have |w| <= 127, in 4 bits |w| <= 7, with one float32 scale for each
 * output channel and each group of group_size inputs (0: all of them). In 8 bits scale = amax / 127. In 4 bits it is
 * the one of amax / 7 * {1, .95, .., .5} with the least squared error; what it clips is |w| = 7.
 *   Packed, bytes: panels of 16 output channels, one after the other, each a sequence of blocks of 64 bytes.
 *     8 bits: a block is 4 inputs. Byte 4c + b is channel c, input {0, 2, 1, 3}[b] of the block.
 *     4 bits: a block is 8 inputs. Byte 4c + b is channel c, input b in its low half and 4 + b in its high half, as
 *             w + 8.
 *   in_features is padded with zero weights to a multiple of 8, out_features to a multiple of 16. The layout is the
 *   same on every machine, so that packed weights can be saved. scale: float32 [groups, padded out_features], with
 *   zeros for padding.
 *
 * PRODUCT. With K cut into segments (at the ends of groups and each 512 inputs), integer sums in a segment are exact:
 *   out[m, n] = bias[n] + scale_x[m] * sum over segments of scale_w[group, n] * sum_k q_x[m, k] * q_w[n, k]
 * Sums over segments are float32, in order. Sums of 4-bit weights take 16 bits as two 8-bit ones.
 *
 * OUTLIER CHANNELS. With c[k] = max_m |x[m, k]|, an input channel k is one if outlier_ratio > 0 and
 *   c[k] > outlier_ratio * rms of c without its max(1, in_features / 32) largest.
 * It is set to zero in the integers, where it would stretch every scale, and x[m, k] * w[n, k] is added in float32, if
 * there are at most max(1, in_features / 32) such channels; with more of them none is. Rows that are not finite don't
 * count. (After Dettmers et al., LLM.int8(), arXiv 2208.07339, which compares with the constant 6. What is usual is
 * measured without the largest, since in a single row a few large channels are most of its rms.)
 *
 * LOOKUP. One packed weight is both the table of an embedding and the linear layer tied to it: lookup_linear_weight
 * reads rows of it, out_features being the number of embeddings, with the very values that unpack_linear_weight gives.
 *
 * CONVOLUTION. conv2d_dynamic quantises each image of the batch with one scale and one width. Its weight is packed with
 * the inputs of an output channel in the order [kernel_height, kernel_width, channels / groups]; each group of output
 * channels has panels of its own. No outlier channels. An image with an infinity or NaN comes out NaN.
 *
 * OPERATORS (Python's functions of the same names in torch_sluice.quantize have the defaults)
 *   sluice::quantize_dynamic(Tensor x, int bits, float target_sqnr, bool per_token)
 *       -> (Tensor q, Tensor scale, Tensor bits)
 *     q: int8 if bits is 4, 7 or 8, else int16, like x. scale float32 and bits int8: [rows], or [1] if not per_token.
 *   sluice::pack_linear_weight(Tensor weight, int bits, int group_size) -> (Tensor packed, Tensor scale)
 *   sluice::unpack_linear_weight(Tensor packed, Tensor scale, int out_features, int in_features, int bits,
 *       int group_size) -> Tensor weight                                                float32, what the product uses
 *   sluice::lookup_linear_weight(Tensor rows, Tensor packed, Tensor scale, int out_features, int in_features, int bits,
 *       int group_size) -> Tensor values
 *     rows int64 or int32 [...], each in [0, out_features); values float32 [..., in_features].
 *   sluice::linear_dynamic(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int out_features,
 *       int weight_bits, int group_size, int activation_bits, float target_sqnr, bool per_token, float outlier_ratio)
 *       -> (Tensor out, Tensor bits)
 *     x [..., in_features], out [..., out_features]; bits int8 [rows]: the width of each row, 0 for one not finite.
 *   sluice::pack_conv2d_weight(Tensor weight, int bits, int group_size, int groups) -> (Tensor packed, Tensor scale)
 *   sluice::conv2d_dynamic(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int out_channels,
 *       int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, int weight_bits,
 *       int group_size, int activation_bits, float target_sqnr) -> (Tensor out, Tensor bits)
 *     x [images, channels, height, width], out likewise, in channels-last memory if x is; bits int8 [images].
 *
 * DTYPES  x and weight: float32, bfloat16 or float16; out has x's. bias: any of these. Rows are all but the last
 *         dimension of x.
 * STRIDES x may have any: what is not contiguous (or channels-last, for conv2d_dynamic) goes through a copy.
 * DEVICES CPU. INFERENCE only: there is no gradient. The functions of torch_sluice.quantize refuse
 *         arguments that require one; backward through the bare operators warns and gives none, torch's rule for
 *         operators without a derivative.
 * ERRORS  SL_INVALID_ARGUMENT, SL_OUT_OF_RANGE, SL_OUT_OF_MEMORY (workspace_size too small), SL_UNSUPPORTED (dtype).
 * DETERMINISM  the same inputs give the same bits, whatever the number of threads. q, scale and bits are the same on
 *         every CPU tier but where a predicted ratio is within rounding of the target; out differs in its last bits.
 */
#ifndef SLUICE_QUANTIZE_H
#define SLUICE_QUANTIZE_H

#include <stdbool.h>

#include <sluice/cpu.h>
#include <sluice/executor.h>
#include <sluice/types.h>

#define SL_QUANTIZE_DYNAMIC_SCHEMA                                           \
  "quantize_dynamic(Tensor x, int bits, float target_sqnr, bool per_token) " \
  "-> (Tensor q, Tensor scale, Tensor bits)"
#define SL_PACK_LINEAR_WEIGHT_SCHEMA \
  "pack_linear_weight(Tensor weight, int bits, int group_size) -> (Tensor packed, Tensor scale)"
#define SL_UNPACK_LINEAR_WEIGHT_SCHEMA                                                                              \
  "unpack_linear_weight(Tensor packed, Tensor scale, int out_features, int in_features, int bits, int group_size) " \
  "-> Tensor weight"
#define SL_LOOKUP_LINEAR_WEIGHT_SCHEMA                                                                           \
  "lookup_linear_weight(Tensor rows, Tensor packed, Tensor scale, int out_features, int in_features, int bits, " \
  "int group_size) -> Tensor"
#define SL_LINEAR_DYNAMIC_SCHEMA                                                                                   \
  "linear_dynamic(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int out_features, int weight_bits, " \
  "int group_size, int activation_bits, float target_sqnr, bool per_token, float outlier_ratio) -> (Tensor out, "  \
  "Tensor bits)"
#define SL_PACK_CONV2D_WEIGHT_SCHEMA \
  "pack_conv2d_weight(Tensor weight, int bits, int group_size, int groups) -> (Tensor packed, Tensor scale)"
#define SL_CONV2D_DYNAMIC_SCHEMA                                                                                      \
  "conv2d_dynamic(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int out_channels, int[2] kernel_size, " \
  "int[2] stride, int[2] padding, int[2] dilation, int groups, int weight_bits, int group_size, "                     \
  "int activation_bits, float target_sqnr) -> (Tensor out, Tensor bits)"

/* Values of activation_bits that choose by the input. */
#define SL_BITS_BY_SQNR 0
#define SL_BITS_BY_AMAX (-1)

/* Output channels of a panel, and what in_features is padded to a multiple of. */
#define SL_QUANTIZE_PANEL 16
#define SL_QUANTIZE_DEPTH 8

#ifdef __cplusplus
extern "C" {
#endif

/* Weights of a linear layer, or of a convolution as groups of them. */
typedef struct sl_quantized_weight {
  int64_t out_features; /* of all groups together */
  int64_t in_features;  /* of one output channel: kernel_height * kernel_width * channels / groups */
  int64_t groups;       /* of a convolution; 1 for a linear layer. Divides out_features. */
  int32_t bits;         /* 8 or 4 */
  int64_t group_size;   /* inputs that share a scale, a multiple of 32; 0: all */
  const void *packed;   /* sl_packed_weight_size() bytes */
  const float *scale;   /* [scale groups, padded out_features] */
} sl_quantized_weight;

/* Bytes of packed, and the two dimensions of scale. Reads the sizes only. */
SL_API sl_status sl_packed_weight_size(const sl_quantized_weight *weight, int64_t *bytes, int64_t *scale_groups,
                                       int64_t *padded_features);

/* Packs values [out_features, in_features] of this dtype into packed and scale, whose sizes the above gives; the
 * pointers of weight are not read. SL_INVALID_ARGUMENT if a value is not finite. */
SL_API sl_status sl_pack_weight(const sl_quantized_weight *weight, sl_dtype dtype, const void *values, void *packed,
                                float *scale);

/* Writes the float32 weights [out_features, in_features] that the integers stand for. */
SL_API sl_status sl_unpack_weight(const sl_quantized_weight *weight, float *values);

typedef struct sl_lookup_weight_args {
  sl_quantized_weight weight; /* groups = 1 */
  int64_t count;
  const int64_t *rows;         /* [count], each in [0, out_features) */
  float *values;               /* written, [count, in_features]; untouched where a row is out of range */
  const sl_executor *executor; /* NULL: serial */
} sl_lookup_weight_args;

/* lookup_linear_weight: the rows of what sl_unpack_weight() writes, the same bits. */
SL_API sl_status sl_lookup_weight(const sl_lookup_weight_args *args);

typedef struct sl_quantize_dynamic_args {
  int64_t rows, columns;
  sl_dtype dtype; /* SL_F32, SL_BF16 or SL_F16 */
  const void *x;  /* [rows, columns] */
  int32_t activation_bits;
  double target_sqnr; /* dB; read for SL_BITS_BY_SQNR */
  bool per_token;     /* a scale for each row; else one for all */
  void *q;            /* written, [rows, columns]: int8_t for 4 and 8 bits, else int16_t */
  float *scale;       /* written, [rows] or [1] */
  int8_t *bits;       /* written, [rows] or [1] */
  void *workspace;    /* 64-byte aligned; its content on entry does not matter */
  size_t workspace_size;
  const sl_executor *executor; /* NULL: serial */
} sl_quantize_dynamic_args;

/* quantize_dynamic, and the bytes of workspace that it needs. */
SL_API sl_status sl_quantize_dynamic_workspace_size(const sl_quantize_dynamic_args *args, size_t *bytes);
SL_API sl_status sl_quantize_dynamic(const sl_quantize_dynamic_args *args);

typedef struct sl_linear_dynamic_args {
  int64_t rows;
  sl_quantized_weight weight;
  sl_dtype dtype;    /* of x and out: SL_F32, SL_BF16 or SL_F16 */
  const void *x;     /* [rows, in_features] */
  const float *bias; /* [out_features]; NULL: none */
  int32_t activation_bits;
  double target_sqnr; /* dB; read for SL_BITS_BY_SQNR */
  bool per_token;
  double outlier_ratio; /* 0: no outlier channels */
  void *out;            /* written, [rows, out_features] */
  int8_t *bits;         /* written, [rows] */
  void *workspace;      /* 64-byte aligned; its content on entry does not matter */
  size_t workspace_size;
  const sl_executor *executor; /* NULL: serial */
} sl_linear_dynamic_args;

/* linear_dynamic, and the bytes of workspace that it needs with this executor. */
SL_API sl_status sl_linear_dynamic_workspace_size(const sl_linear_dynamic_args *args, size_t *bytes);
SL_API sl_status sl_linear_dynamic(const sl_linear_dynamic_args *args);

typedef struct sl_conv2d_dynamic_args {
  int64_t images, channels, height, width;
  int64_t kernel[2], stride[2], padding[2], dilation[2]; /* height, width */
  sl_quantized_weight weight;                            /* in_features = kernel[0] * kernel[1] * channels / groups */
  sl_dtype dtype;                                        /* of x and out: SL_F32, SL_BF16 or SL_F16 */
  bool channels_last;                                    /* memory of x and out is [images, height, width, channels] */
  const void *x;
  const float *bias; /* [out_features]; NULL: none */
  int32_t activation_bits;
  double target_sqnr; /* dB; read for SL_BITS_BY_SQNR */
  void *out;          /* written */
  int8_t *bits;       /* written, [images] */
  void *workspace;    /* 64-byte aligned; its content on entry does not matter */
  size_t workspace_size;
  const sl_executor *executor; /* NULL: serial */
} sl_conv2d_dynamic_args;

/* Height and width of the output: floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1. */
SL_API sl_status sl_conv2d_dynamic_out_size(const sl_conv2d_dynamic_args *args, int64_t out_size[2]);

/* conv2d_dynamic, and the bytes of workspace that it needs with this executor. */
SL_API sl_status sl_conv2d_dynamic_workspace_size(const sl_conv2d_dynamic_args *args, size_t *bytes);
SL_API sl_status sl_conv2d_dynamic(const sl_conv2d_dynamic_args *args);

/* The same operators in plain scalar C, sums in int64 and double: the specification that every kernel is tested
 * against. They need the same workspace and run on the calling thread. */
SL_API sl_status sl_quantize_dynamic_reference(const sl_quantize_dynamic_args *args);
SL_API sl_status sl_linear_dynamic_reference(const sl_linear_dynamic_args *args);
SL_API sl_status sl_conv2d_dynamic_reference(const sl_conv2d_dynamic_args *args);
SL_API sl_status sl_lookup_weight_reference(const sl_lookup_weight_args *args);

/* Runs the instruction sequence that multiplies int8 by int8 in the tier that dispatch picks, on registers only, and
 * returns how many multiply-accumulates that was, at least count. Divided by the seconds it took, that is the peak that
 * a kernel's speed is a share of. Runs on the calling thread. */
SL_API int64_t sl_quantize_run_peak(int64_t count);

/* Name of the kernel that dispatch picks on this machine, e.g. "avx2". Never NULL. */
SL_API const char *sl_quantize_kernel_name(void);

#ifdef __cplusplus
}
#endif
#endif

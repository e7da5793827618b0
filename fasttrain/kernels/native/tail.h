// The C interface of the step tail on the CPU, and what its two halves (dispatch, arithmetic) share.
// Everything here is plain data: Python mirrors the structs with ctypes (fasttrain/kernels/library.py).
#pragma once

#include <cstdint>

namespace fasttrain {

constexpr int64_t kChunk = 8192;            // elements of one piece of work; a chunk never crosses a tensor
constexpr int64_t kSerialBelow = 32 * 1024; // elements; under this a parallel region costs more than it saves

enum Dtype : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDtypes = 4 };
enum Rule : int32_t { kSGD = 0, kAdam = 1, kLion = 2 };
enum NormKind : int32_t { kL2 = 0, kInf = 1 };
enum CallFlag : int32_t { kMeasure = 1, kCheck = 2, kZeroGrads = 4 };
enum GroupFlag : int32_t { kNesterov = 1, kAmsgrad = 2, kMaximize = 4, kDecoupled = 8 };
enum Outcome : int32_t { kStepped = 0, kSkipped = 1 };

// One parameter: where it, its optimizer state and its step count live. `fresh`: slot 0 holds nothing yet (SGD).
struct Row {
  void *param;
  void *slot[3]; // SGD: momentum_buffer; Adam: exp_avg, exp_avg_sq, max_exp_avg_sq; Lion: exp_avg
  void *step;    // Adam: 0-d float32 or float64
  int64_t numel;
  int32_t dtype;
  int32_t group;
  int32_t step_is_double;
  int32_t fresh;
  int32_t grad_dtype; // dtype, or kBFloat16 where dtype is kFloat32
  int32_t unused;
};

struct Group {
  double lr, beta1, beta2, eps, weight_decay, momentum, dampening;
  const void *lr_address; // when lr is a 0-d tensor: read at every call
  int32_t lr_dtype;
  int32_t flags;
};

// One call: what differs from step to step.
struct Call {
  const uint64_t *grads; // one address a row, 0 = leave that row alone
  Row *rows;
  const Group *groups;
  const void *loss; // optional: its value joins the finite test
  float *norm_out;  // optional: the norm of the unscaled gradients
  float *norms_out; // optional: that of each row, 0 without a gradient
  double max_norm;  // +inf = measure only
  double clip_value; // +inf = none
  double grad_scale; // multiplies every gradient (1 / loss scale)
  int32_t loss_dtype;
  int32_t flags;
  int32_t norm_kind;
  int32_t unused;
};

// What the arithmetic of one group at one step count needs, precomputed in double.
struct Coefficients {
  double lr, decay, l2, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inverse_root, momentum, undamped;
};

enum Mode : int32_t {
  kPlainSGD,
  kFirstMomentum,
  kMomentum,
  kFirstNesterov,
  kNesterovMomentum,
  kPlainAdam,
  kAmsgradAdam,
  kLionSign,
  kModes
};

struct Work {
  void *param;
  const void *grad;
  void *slot[3];
  int64_t count;
  double factor; // grad_scale * clip factor, negative to maximize
  double clip_value;
  const Coefficients *coefficients;
};

// One instruction set's arithmetic. Every set gives the same bits: no fused multiply-add, the same lanes everywhere.
struct Kernels {
  double (*norm[2][kDtypes])(const void *, int64_t); // by NormKind; L2: the sum of squares
  void (*update[kModes][kDtypes])(const Work &);
  void (*update_mixed[kModes])(const Work &); // float32 everything, bfloat16 gradients
  void (*add[kDtypes])(void *, const void *, int64_t, double);
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

} // namespace fasttrain

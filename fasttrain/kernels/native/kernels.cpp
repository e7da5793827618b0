// The arithmetic of one chunk, compiled once for each instruction set (FASTTRAIN_ISA names the namespace).
//
// Sums run over 64 fixed lanes and no multiply-add is contracted, so every instruction set and every thread count
// gives the same bits. All helpers are in unnamed namespaces: a helper compiled for AVX-512 must never be the one that
// the linker keeps for a machine without it.

#include "tail.h"

#include "numbers.h"

namespace {

using namespace fasttrain;

constexpr int kLanes = 64;
constexpr int64_t kBlock = 32 * kLanes; // fp32 terms added up before they join the double sum

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

template <class C> struct Lanes {
  static constexpr int kWidth = 64 / sizeof(C);
  static constexpr int kVectors = kLanes / kWidth;
  typedef C Vector __attribute__((vector_size(64)));
  Vector v[kVectors];
};

template <class F> inline void fetch(Lanes<typename F::wide> &to, const typename F::stored *x) {
  typename F::wide wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = F::load(x[i]);
  std::memcpy(&to.v, wide, sizeof to.v);
}
template <> inline void fetch<Float32>(Lanes<float> &to, const float *x) { std::memcpy(&to.v, x, sizeof to.v); }
template <> inline void fetch<Float64>(Lanes<double> &to, const double *x) { std::memcpy(&to.v, x, sizeof to.v); }

// The last, partial 64: padded with zeros.
template <class F> inline void fetch_rest(Lanes<typename F::wide> &to, const typename F::stored *x, int64_t count) {
  typename F::stored padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = x[i];
  fetch<F>(to, padded);
}

template <class C> inline double total(const Lanes<C> &lanes) {
  C value[kLanes];
  std::memcpy(value, &lanes.v, sizeof value);
  double part[8] = {};
  for (int i = 0; i < kLanes; i += 8)
    for (int j = 0; j < 8; ++j) part[j] += static_cast<double>(value[i + j]);
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

template <class F> double exact_sum_of_squares(const typename F::stored *x, int64_t count) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) {
      const double value = static_cast<double>(F::load(x[i + j]));
      part[j] += value * value;
    }
  for (; i < count; ++i) {
    const double value = static_cast<double>(F::load(x[i]));
    part[i % 8] += value * value;
  }
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

template <class F> double sum_of_squares(const void *data, int64_t count) {
  using C = typename F::wide;
  const auto *x = static_cast<const typename F::stored *>(data);
  double sum = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t stop = start + kBlock < count ? start + kBlock : count;
    Lanes<C> lanes = {}, read;
    int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes) {
      fetch<F>(read, x + i);
      for (int j = 0; j < Lanes<C>::kVectors; ++j) lanes.v[j] += read.v[j] * read.v[j];
    }
    if (i < stop) {
      fetch_rest<F>(read, x + i, stop - i);
      for (int j = 0; j < Lanes<C>::kVectors; ++j) lanes.v[j] += read.v[j] * read.v[j];
    }
    sum += total(lanes);
  }
  // A float square over- or underflows long before its root does: such a chunk is added up again in double.
  if (sizeof(C) == 4 && !(sum > 1e-30 && sum < 1e37)) return exact_sum_of_squares<F>(x, count);
  return sum;
}

template <class F> double largest(const void *data, int64_t count) {
  using C = typename F::wide;
  const auto *x = static_cast<const typename F::stored *>(data);
  Lanes<C> most = {}, taint = {}, read; // taint: 0, or NaN once an element was NaN
  for (int64_t i = 0; i < count; i += kLanes) {
    if (i + kLanes <= count) fetch<F>(read, x + i);
    else fetch_rest<F>(read, x + i, count - i);
    for (int j = 0; j < Lanes<C>::kVectors; ++j) {
      const auto size = read.v[j] < 0 ? -read.v[j] : read.v[j];
      most.v[j] = size > most.v[j] ? size : most.v[j];
      taint.v[j] = size == size ? taint.v[j] : size;
    }
  }
  double result = 0;
  C value[kLanes], bad[kLanes];
  std::memcpy(value, &most.v, sizeof value);
  std::memcpy(bad, &taint.v, sizeof bad);
  for (int i = 0; i < kLanes; ++i) {
    if (bad[i] != bad[i]) return static_cast<double>(bad[i]);
    if (static_cast<double>(value[i]) > result) result = static_cast<double>(value[i]);
  }
  return result;
}

template <class C> inline C clamped(C x, C limit) { // NaN stays NaN
  const C below = x > limit ? limit : x;
  return below < -limit ? -limit : below;
}

template <class F, class G, Mode mode> void sgd(const Work &work) {
  using C = typename F::wide;
  const Coefficients &c = *work.coefficients;
  auto *__restrict p = static_cast<typename F::stored *>(work.param);
  const auto *__restrict g = static_cast<const typename G::stored *>(work.grad);
  auto *__restrict buffer = static_cast<typename F::stored *>(work.slot[0]);
  const C factor = static_cast<C>(work.factor), limit = static_cast<C>(work.clip_value);
  const C lr = static_cast<C>(c.lr), l2 = static_cast<C>(c.l2);
  const C momentum = static_cast<C>(c.momentum), undamped = static_cast<C>(c.undamped);
  const int64_t count = work.count;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const C weight = F::load(p[i]);
    C grad = clamped(G::load(g[i]) * factor, limit) + l2 * weight;
    if (mode != kPlainSGD) {
      C moment = grad;
      if (mode == kMomentum || mode == kNesterovMomentum) moment = momentum * F::load(buffer[i]) + undamped * grad;
      buffer[i] = F::store(moment);
      grad = mode == kFirstNesterov || mode == kNesterovMomentum ? grad + momentum * moment : moment;
    }
    p[i] = F::store(weight - lr * grad);
  }
}

template <class F, class G, bool amsgrad> void adam(const Work &work) {
  using C = typename F::wide;
  const Coefficients &c = *work.coefficients;
  auto *__restrict p = static_cast<typename F::stored *>(work.param);
  const auto *__restrict g = static_cast<const typename G::stored *>(work.grad);
  auto *__restrict first = static_cast<typename F::stored *>(work.slot[0]);
  auto *__restrict second = static_cast<typename F::stored *>(work.slot[1]);
  auto *__restrict most = static_cast<typename F::stored *>(work.slot[2]);
  const C factor = static_cast<C>(work.factor), limit = static_cast<C>(work.clip_value);
  const C decay = static_cast<C>(c.decay), l2 = static_cast<C>(c.l2), eps = static_cast<C>(c.eps);
  const C weight1 = static_cast<C>(c.one_minus_beta1);
  const C beta2 = static_cast<C>(c.beta2), weight2 = static_cast<C>(c.one_minus_beta2);
  const C step_size = static_cast<C>(c.step_size), inverse_root = static_cast<C>(c.inverse_root);
  const int64_t count = work.count;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const C weight = F::load(p[i]);
    const C grad = clamped(G::load(g[i]) * factor, limit) + l2 * weight;
    C m = F::load(first[i]);
    m = m + (grad - m) * weight1;
    C v = F::load(second[i]) * beta2 + (grad * grad) * weight2;
    first[i] = F::store(m);
    second[i] = F::store(v);
    if (amsgrad) {
      const C before = F::load(most[i]);
      v = before > v ? before : v;
      most[i] = F::store(v);
    }
    p[i] = F::store(weight * decay - (step_size * m) / (root(v) * inverse_root + eps));
  }
}

// Chen et al. 2023, algorithm 2: the sign of an interpolated momentum, decoupled decay.
template <class F, class G> void lion(const Work &work) {
  using C = typename F::wide;
  const Coefficients &c = *work.coefficients;
  auto *__restrict p = static_cast<typename F::stored *>(work.param);
  const auto *__restrict g = static_cast<const typename G::stored *>(work.grad);
  auto *__restrict moment = static_cast<typename F::stored *>(work.slot[0]);
  const C factor = static_cast<C>(work.factor), limit = static_cast<C>(work.clip_value);
  const C decay = static_cast<C>(c.decay), lr = static_cast<C>(c.lr);
  const C beta1 = static_cast<C>(c.beta1), weight1 = static_cast<C>(c.one_minus_beta1);
  const C beta2 = static_cast<C>(c.beta2), weight2 = static_cast<C>(c.one_minus_beta2);
  const int64_t count = work.count;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const C grad = clamped(G::load(g[i]) * factor, limit);
    const C m = F::load(moment[i]);
    const C way = beta1 * m + weight1 * grad;
    const C up = way > 0 ? lr : C(0), down = way < 0 ? lr : C(0);
    p[i] = F::store(F::load(p[i]) * decay - (up - down));
    moment[i] = F::store(beta2 * m + weight2 * grad);
  }
}

template <class F> void add(void *to, const void *from, int64_t count, double scale) {
  using C = typename F::wide;
  auto *__restrict y = static_cast<typename F::stored *>(to);
  const auto *__restrict x = static_cast<const typename F::stored *>(from);
  const C by = static_cast<C>(scale);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = F::store(F::load(y[i]) + by * F::load(x[i]));
}

} // namespace

#define FASTTRAIN_EACH(name) {name<Float32>, name<Float64>, name<BFloat16>, name<Float16>}
#define FASTTRAIN_EACH_RULE(name) \
  { name<Float32, Float32>, name<Float64, Float64>, name<BFloat16, BFloat16>, name<Float16, Float16> }
#define FASTTRAIN_EACH_OF(name, option)                                                     \
  {                                                                                         \
    name<Float32, Float32, option>, name<Float64, Float64, option>,                         \
        name<BFloat16, BFloat16, option>, name<Float16, Float16, option>                    \
  }

namespace fasttrain {
namespace FASTTRAIN_ISA {
extern const Kernels kernels = {
    {FASTTRAIN_EACH(sum_of_squares), FASTTRAIN_EACH(largest)},
    {FASTTRAIN_EACH_OF(sgd, kPlainSGD), FASTTRAIN_EACH_OF(sgd, kFirstMomentum), FASTTRAIN_EACH_OF(sgd, kMomentum),
     FASTTRAIN_EACH_OF(sgd, kFirstNesterov), FASTTRAIN_EACH_OF(sgd, kNesterovMomentum), FASTTRAIN_EACH_OF(adam, false),
     FASTTRAIN_EACH_OF(adam, true), FASTTRAIN_EACH_RULE(lion)},
    {sgd<Float32, BFloat16, kPlainSGD>, sgd<Float32, BFloat16, kFirstMomentum>, sgd<Float32, BFloat16, kMomentum>,
     sgd<Float32, BFloat16, kFirstNesterov>, sgd<Float32, BFloat16, kNesterovMomentum>, adam<Float32, BFloat16, false>,
     adam<Float32, BFloat16, true>, lion<Float32, BFloat16>},
    FASTTRAIN_EACH(add),
};
}
} // namespace fasttrain

// The step tail on the CPU: plans, dispatch, one parallel region a call. The C interface is at the end.
//
// A call first measures every chunk of gradient, waits, and then - each thread having come to the same verdict from the
// same partial sums added in the same order - updates every chunk. Both passes go forward: going back over the chunks
// would find the last gradients in the caches, but defeats the prefetchers (25 M parameters on one Zen 5 core: 16.1 ms
// against 13.0). Nothing allocates and nothing throws on that road.

#include "machine.h"
#include "tail.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#define FASTTRAIN_API extern "C" __attribute__((visibility("default")))

namespace fasttrain {
namespace {

struct Chunk {
  int64_t row, offset, count;
  int64_t before; // elements in all chunks before this one
};

struct Verdict {
  double norm, clip;
  bool skip;
};

constexpr int64_t kItemSize[kDtypes] = {4, 8, 2, 2};

int best_isa() {
#ifdef FASTTRAIN_X86_LEVELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

const Kernels *kernels_of(int isa) {
#ifdef FASTTRAIN_X86_LEVELS
  return isa == 2 ? &avx512::kernels : isa == 1 ? &avx2::kernels : &baseline::kernels;
#else
  (void)isa;
  return &baseline::kernels;
#endif
}

int active_isa = best_isa();
const Kernels *active = kernels_of(active_isa);

double step_count(const Row &row) {
  return row.step_is_double ? *static_cast<double *>(row.step) : static_cast<double>(*static_cast<float *>(row.step));
}

} // namespace

// What is made once for a list of tensors: the chunk table, and the memory that a call works in.
struct Plan {
  int64_t rows, chunks, total;
  int32_t rule;
  Chunk *chunk;
  double *partial;            // one a chunk
  Coefficients *coefficients; // as many as there are rows: one for each distinct (group, step count)
  int32_t *which;             // row -> coefficients
  Verdict verdict;
};

namespace {

int64_t first_chunk(const Plan &plan, int64_t elements) { // of those that start at or after so many elements
  int64_t low = 0, high = plan.chunks;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (plan.chunk[middle].before < elements) low = middle + 1;
    else high = middle;
  }
  return low;
}

struct Share { int64_t first, last; };

Share share_of(const Plan &plan, int thread, int threads) {
  const auto edge = [&](int t) { return t == threads ? plan.chunks : first_chunk(plan, plan.total / threads * t); };
  return {thread == 0 ? 0 : edge(thread), edge(thread + 1)};
}

int threads_for(int64_t total) {
#ifdef _OPENMP
  if (total < kSerialBelow) return 1;
  const int64_t most = omp_get_max_threads(), useful = (total + kChunk - 1) / kChunk;
  return static_cast<int>(most < useful ? most : useful);
#else
  (void)total;
  return 1;
#endif
}

template <class Body> void in_parallel(int threads, const Body &body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      FlushSubnormals flush;
      body(omp_get_thread_num(), omp_get_num_threads());
    }
    return;
  }
#endif
  FlushSubnormals flush;
  body(0, 1);
}

inline void wait_for_all(int threads) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp barrier
  }
#else
  (void)threads;
#endif
}

inline char *at(void *base, int32_t dtype, const Chunk &chunk) {
  return base ? static_cast<char *>(base) + chunk.offset * kItemSize[dtype] : nullptr;
}

inline char *gradient(const Call &call, const Row &row, const Chunk &chunk) {
  return at(reinterpret_cast<void *>(call.grads[chunk.row]), row.grad_dtype, chunk);
}

inline void zero(const Row &row, const Chunk &chunk, char *grad) {
  std::memset(grad, 0, static_cast<size_t>(chunk.count * kItemSize[row.grad_dtype]));
}

void measure(Plan &plan, const Call &call, Share share) {
  for (int64_t i = share.first; i < share.last; ++i) {
    const Chunk &chunk = plan.chunk[i];
    const Row &row = call.rows[chunk.row];
    const char *grad = gradient(call, row, chunk);
    plan.partial[i] = grad ? active->norm[call.norm_kind][row.grad_dtype](grad, chunk.count) : 0.0;
  }
}

double norm_of(const Plan &plan, const Call &call, int64_t first, int64_t last) {
  double sum = 0;
  for (int64_t i = first; i < last; ++i) {
    const double part = plan.partial[i];
    if (call.norm_kind == kL2) sum += part;
    else if (part != part || part > sum) sum = part;
    if (sum != sum) return sum;
  }
  return std::fabs(call.grad_scale) * (call.norm_kind == kL2 ? std::sqrt(sum) : sum);
}

// Each row's own norm, from the partial sums that are there anyway.
void write_norms(const Plan &plan, const Call &call) {
  for (int64_t i = 0; i < plan.rows; ++i) call.norms_out[i] = 0;
  for (int64_t first = 0, last; first < plan.chunks; first = last) {
    const int64_t row = plan.chunk[first].row;
    for (last = first; last < plan.chunks && plan.chunk[last].row == row;) ++last;
    call.norms_out[row] = static_cast<float>(norm_of(plan, call, first, last));
  }
}

// The same words as torch.nn.utils.clip_grad_norm_: a NaN norm makes a NaN factor.
Verdict judge(const Plan &plan, const Call &call) {
  Verdict verdict = {NAN, 1.0, false};
  if (call.flags & kMeasure) {
    verdict.norm = norm_of(plan, call, 0, plan.chunks);
    if (call.max_norm != INFINITY) {
      const double clip = call.max_norm / (verdict.norm + 1e-6);
      verdict.clip = clip > 1.0 ? 1.0 : clip;
    }
    verdict.skip = (call.flags & kCheck) && !std::isfinite(verdict.norm);
  }
  if ((call.flags & kCheck) && call.loss && !std::isfinite(read_scalar(call.loss, call.loss_dtype))) verdict.skip = true;
  return verdict;
}

Mode mode_of(const Plan &plan, const Row &row, const Group &group) {
  if (plan.rule == kAdam) return group.flags & kAmsgrad ? kAmsgradAdam : kPlainAdam;
  if (plan.rule == kLion) return kLionSign;
  if (group.momentum == 0) return kPlainSGD;
  if (group.flags & kNesterov) return row.fresh ? kFirstNesterov : kNesterovMomentum;
  return row.fresh ? kFirstMomentum : kMomentum;
}

void update(Plan &plan, const Call &call, Share share, double factor) {
  for (int64_t i = share.first; i < share.last; ++i) {
    const Chunk &chunk = plan.chunk[i];
    const Row &row = call.rows[chunk.row];
    const Group &group = call.groups[row.group];
    char *grad = gradient(call, row, chunk);
    if (!grad) continue;
    const auto slot = [&](int k) { return at(row.slot[k], row.dtype, chunk); };
    const Work work = {at(row.param, row.dtype, chunk),
                       grad,
                       {slot(0), slot(1), slot(2)},
                       chunk.count,
                       group.flags & kMaximize ? -factor : factor,
                       call.clip_value,
                       plan.coefficients + plan.which[chunk.row]};
    const Mode mode = mode_of(plan, row, group);
    (row.grad_dtype == row.dtype ? active->update[mode][row.dtype] : active->update_mixed[mode])(work);
    if (call.flags & kZeroGrads) zero(row, chunk, grad);
  }
}

void clear(const Plan &plan, const Call &call, Share share) {
  for (int64_t i = share.first; i < share.last; ++i) {
    const Chunk &chunk = plan.chunk[i];
    const Row &row = call.rows[chunk.row];
    char *grad = gradient(call, row, chunk);
    if (grad) zero(row, chunk, grad);
  }
}

Coefficients coefficients_of(const Plan &plan, const Group &group, double step) {
  Coefficients c = {};
  c.lr = group.lr_address ? read_scalar(group.lr_address, group.lr_dtype) : group.lr;
  const bool decoupled = plan.rule != kSGD && (group.flags & kDecoupled);
  c.decay = decoupled ? 1.0 - c.lr * group.weight_decay : 1.0;
  c.l2 = decoupled ? 0.0 : group.weight_decay;
  if (plan.rule == kLion) {
    c.beta1 = group.beta1;
    c.one_minus_beta1 = 1.0 - group.beta1;
    c.beta2 = group.beta2;
    c.one_minus_beta2 = 1.0 - group.beta2;
  } else if (plan.rule == kAdam) {
    c.one_minus_beta1 = 1.0 - group.beta1;
    c.beta2 = group.beta2;
    c.one_minus_beta2 = 1.0 - group.beta2;
    c.eps = group.eps;
    c.step_size = c.lr / (1.0 - std::pow(group.beta1, step));
    c.inverse_root = 1.0 / std::sqrt(1.0 - std::pow(group.beta2, step));
  } else {
    c.momentum = group.momentum;
    c.undamped = 1.0 - group.dampening;
  }
  return c;
}

// Coefficients are computed once for each run of rows with one group and one step count, which is nearly always once.
void prepare(Plan &plan, const Call &call) {
  int32_t made = -1, group = -1;
  double step = -1;
  for (int64_t i = 0; i < plan.rows; ++i) {
    if (!call.grads[i]) continue;
    const Row &row = call.rows[i];
    const double next = plan.rule == kAdam ? step_count(row) + 1 : 0;
    if (row.group != group || next != step) {
      group = row.group;
      step = next;
      plan.coefficients[++made] = coefficients_of(plan, call.groups[group], step);
    }
    plan.which[i] = made;
  }
}

void count_steps(const Plan &plan, const Call &call) {
  for (int64_t i = 0; i < plan.rows; ++i) {
    if (!call.grads[i]) continue;
    Row &row = call.rows[i];
    row.fresh = row.fresh && !(row.slot[0] && call.groups[row.group].momentum != 0);
    if (!row.step) continue;
    if (row.step_is_double) *static_cast<double *>(row.step) += 1;
    else *static_cast<float *>(row.step) += 1;
  }
}

} // namespace
} // namespace fasttrain

using namespace fasttrain;

// Counts up with every change of a struct or of a function below; Python refuses a library of another number.
FASTTRAIN_API int32_t fasttrain_interface() { return 2; }
FASTTRAIN_API int32_t fasttrain_isa() { return active_isa; }
FASTTRAIN_API int32_t fasttrain_threads() { return threads_for(INT64_MAX - kChunk); }

// For tests: takes the asked level or the best below it, and says which.
FASTTRAIN_API int32_t fasttrain_force_isa(int32_t level) {
  const int best = best_isa();
  active_isa = level < 0 || level > best ? best : level;
  active = kernels_of(active_isa);
  return active_isa;
}

FASTTRAIN_API void fasttrain_plan_free(Plan *plan) {
  if (!plan) return;
  std::free(plan->chunk);
  std::free(plan->partial);
  std::free(plan->coefficients);
  std::free(plan->which);
  std::free(plan);
}

// A plan for these sizes, or null when there is no memory for it.
FASTTRAIN_API Plan *fasttrain_plan_make(const int64_t *numel, int64_t rows, int32_t rule) {
  auto *plan = static_cast<Plan *>(std::calloc(1, sizeof(Plan)));
  if (!plan) return nullptr;
  plan->rows = rows;
  plan->rule = rule;
  for (int64_t i = 0; i < rows; ++i) plan->chunks += (numel[i] + kChunk - 1) / kChunk;
  const auto some = [](int64_t count) { return static_cast<size_t>(count > 0 ? count : 1); };
  plan->chunk = static_cast<Chunk *>(std::calloc(some(plan->chunks), sizeof(Chunk)));
  plan->partial = static_cast<double *>(std::calloc(some(plan->chunks), sizeof(double)));
  plan->coefficients = static_cast<Coefficients *>(std::calloc(some(rows), sizeof(Coefficients)));
  plan->which = static_cast<int32_t *>(std::calloc(some(rows), sizeof(int32_t)));
  if (!plan->chunk || !plan->partial || !plan->coefficients || !plan->which) {
    fasttrain_plan_free(plan);
    return nullptr;
  }
  Chunk *chunk = plan->chunk;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t offset = 0; offset < numel[i]; offset += kChunk) {
      const int64_t rest = numel[i] - offset;
      *chunk = {i, offset, rest < kChunk ? rest : kChunk, plan->total};
      plan->total += chunk++->count;
    }
  return plan;
}

// Norm, verdict, update. kStepped, or kSkipped and nothing but the norm (and zeroed gradients, if asked) is written.
FASTTRAIN_API int32_t fasttrain_step(Plan *plan, const Call *call) {
  prepare(*plan, *call);
  in_parallel(threads_for(plan->total), [&](int thread, int threads) {
    const Share share = share_of(*plan, thread, threads);
    if (call->flags & kMeasure) {
      measure(*plan, *call, share);
      wait_for_all(threads);
    }
    const Verdict verdict = judge(*plan, *call);
    if (!verdict.skip) update(*plan, *call, share, call->grad_scale * verdict.clip);
    else if (call->flags & kZeroGrads) clear(*plan, *call, share);
    if (thread == 0) plan->verdict = verdict;
  });
  if (call->norm_out && (call->flags & kMeasure)) *call->norm_out = static_cast<float>(plan->verdict.norm);
  if (call->norms_out && (call->flags & kMeasure)) write_norms(*plan, *call);
  if (plan->verdict.skip) return kSkipped;
  count_steps(*plan, *call);
  return kStepped;
}

// The norm alone, in double.
FASTTRAIN_API double fasttrain_norm(Plan *plan, const Call *call) {
  in_parallel(threads_for(plan->total),
              [&](int thread, int threads) { measure(*plan, *call, share_of(*plan, thread, threads)); });
  return norm_of(*plan, *call, 0, plan->chunks);
}

// rows[i].param += grad_scale * grads[i], every row in one go.
FASTTRAIN_API void fasttrain_add(Plan *plan, const Call *call) {
  in_parallel(threads_for(plan->total), [&](int thread, int threads) {
    const Share share = share_of(*plan, thread, threads);
    for (int64_t i = share.first; i < share.last; ++i) {
      const Chunk &chunk = plan->chunk[i];
      const Row &row = call->rows[chunk.row];
      const char *from = gradient(*call, row, chunk);
      if (from) active->add[row.dtype](at(row.param, row.dtype, chunk), from, chunk.count, call->grad_scale);
    }
  });
}

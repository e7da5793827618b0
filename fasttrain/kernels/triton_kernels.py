"""The step tail in Triton: norm of every chunk, one verdict and one record a row, update of every chunk.

Three launches for a list of tensors of one dtype, whatever their number: `norm_chunks` and `update_chunks` are one program a
chunk, `judge` is one program between them. (A last-arriving program of `norm_chunks` could judge, saving the small launch; the
interpreter runs programs one by one and could not have shown that right.) No atomics: every sum is added in one fixed order.

Imported only when a tail is made on a GPU (or in Triton's interpreter): the one file that imports triton.
"""
# mypy: ignore-errors
# ruff: noqa: SIM108, SIM109 - a branch on a constant is one that the compiler takes, a ternary is not always

import triton
import triton.language as tl

# One row of int64 a parameter: addresses (0 where there is none), then its group, -1 when it has no gradient.
PARAM, GRAD, SLOT0, SLOT1, SLOT2, MASTER, STEP, GROUP, ROW = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8))
# The table of float64 that the host writes: knobs of the call, then HYPER numbers a parameter group.
GRAD_SCALE, MAX_NORM, CLIP_VALUE, GROWTH, BACKOFF, INTERVAL, KNOBS = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 8))
LR, BETA1, BETA2, EPS, DECAY, MOMENTUM, DAMPENING, LOG1, LOG2, DECOUPLED, SIGN, HYPER = (
    tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)
)
# What `judge` tells `update_chunks`: of the call (float32), and RECORD float32 a row.
FACTOR, SKIP, LIMIT = (tl.constexpr(i) for i in (0, 1, 2))
KEEP, L2, WEIGHT1, B2, WEIGHT2, EPSILON, SIZE, ROOT, UNDAMPED, RATE, INERTIA, TURN, B1, RECORD = (
    tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16)
)
SGD, SGD_MOMENTUM, NESTEROV, ADAM, AMSGRAD, LION = (tl.constexpr(i) for i in range(6))
TYPES = (tl.float32, tl.bfloat16, tl.float16)  # triton_plan.FLOATS
HUGE = tl.constexpr(1.7976931348623157e308)  # the largest float64: anything above, and NaN, is not finite


@triton.jit
def _cell(p_rows, i_row, COLUMN: tl.constexpr, KIND: tl.constexpr):
    return tl.load(p_rows + i_row * ROW + COLUMN).to(tl.pointer_type(KIND))


@triton.jit
def _get(p, at, mask, MASKED: tl.constexpr):
    if MASKED:
        value = tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(p + at).to(tl.float32)
    return value


@triton.jit
def _put(p, at, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(p + at, value.to(p.dtype.element_ty), mask=mask)
    else:
        tl.store(p + at, value.to(p.dtype.element_ty))


@triton.jit(do_not_specialize=["first"])
def norm_chunks(
    p_rows, p_chunks, p_partial, first,
    G: tl.constexpr, INF: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[chunk]: the sum of squares of a chunk of gradient, or its largest magnitude (NaN when it holds one)."""
    i = tl.program_id(0).to(tl.int64) + first
    i_row = tl.load(p_chunks + i * 3)
    count = tl.load(p_chunks + i * 3 + 2)
    p_g = tl.multiple_of(_cell(p_rows, i_row, GRAD, G) + tl.load(p_chunks + i * 3 + 1), ALIGN)
    lane = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_bad = tl.zeros([BLOCK], tl.int32)
    if count == CHUNK:
        for j in tl.range(0, CHUNK, BLOCK, num_stages=1):
            x = tl.load(p_g + j + lane).to(tl.float32)
            if INF:
                b_sum = tl.maximum(b_sum, tl.abs(x))
                b_bad += (x != x).to(tl.int32)
            else:
                b_sum += x * x
    else:
        for j in tl.range(0, CHUNK, BLOCK, num_stages=1):
            x = tl.load(p_g + j + lane, mask=j + lane < count, other=0.0).to(tl.float32)
            if INF:
                b_sum = tl.maximum(b_sum, tl.abs(x))
                b_bad += (x != x).to(tl.int32)
            else:
                b_sum += x * x
    if INF:
        most = tl.max(b_sum, axis=0).to(tl.float64)
        result = tl.where(tl.sum(b_bad, axis=0) > 0, float("nan"), most)
    else:
        result = tl.sum(b_sum.to(tl.float64), axis=0)
        # A float square over- or underflows long before its root does: such a chunk is added up again in double.
        if ((result > 1e-30) & (result < 1e37)) == 0:
            b_wide = tl.zeros([BLOCK], tl.float64)
            for j in tl.range(0, CHUNK, BLOCK, num_stages=1):
                x = tl.load(p_g + j + lane, mask=j + lane < count, other=0.0).to(tl.float64)
                b_wide += x * x
            result = tl.sum(b_wide, axis=0)
    tl.store(p_partial + i, result)


@triton.jit
def _fold(p_partial, start, stop, INF: tl.constexpr, BLOCK: tl.constexpr):
    """All of partial[start:stop] in float64, in one fixed order."""
    lane = tl.arange(0, BLOCK)
    b_all = tl.zeros([BLOCK], tl.float64)
    b_bad = tl.zeros([BLOCK], tl.int32)
    while start < stop:
        x = tl.load(p_partial + start + lane, mask=start + lane < stop, other=0.0)
        if INF:
            b_all = tl.maximum(b_all, x)
            b_bad += (x != x).to(tl.int32)
        else:
            b_all += x
        start += BLOCK
    if INF:
        result = tl.where(tl.sum(b_bad, axis=0) > 0, float("nan"), tl.max(b_all, axis=0))
    else:
        result = tl.sqrt(tl.sum(b_all, axis=0))
    return result


@triton.jit(do_not_specialize_on_alignment=["p_scale", "p_rescale", "p_out"])
def row_norms(
    p_partial, p_span, p_table, p_scale, p_rescale, p_out,
    INF: tl.constexpr, SCALED: tl.constexpr, RESCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row]: the norm of one parameter's unscaled gradient, from the partial sums that are there anyway."""
    i_row = tl.program_id(0)
    value = _fold(p_partial, tl.load(p_span + i_row * 2), tl.load(p_span + i_row * 2 + 1), INF, BLOCK)
    factor = tl.load(p_table + GRAD_SCALE)
    if RESCALED:
        factor = factor * tl.load(p_rescale).to(tl.float64)
    if SCALED:
        factor = factor / tl.load(p_scale).to(tl.float64)
    tl.store(p_out + i_row, (tl.abs(factor) * value).to(tl.float32))


@triton.jit(do_not_specialize=["n_partial", "n_rows"], do_not_specialize_on_alignment=["p_scale", "p_tracker", "p_loss", "p_rescale"])
def judge(
    p_partial, n_partial, p_table, p_rows, n_rows, p_record, p_verdict, p_norm, p_skipped, p_skips, p_scale, p_tracker, p_loss, p_rescale,
    MEASURE: tl.constexpr, CHECK: tl.constexpr, INF: tl.constexpr, RULE: tl.constexpr,
    SCALED: tl.constexpr, LOSS: tl.constexpr, RESCALED: tl.constexpr, STICKY: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The norm, the clip factor and whether to skip; the loss scale moved on; every row's step count and coefficients."""
    factor = tl.load(p_table + GRAD_SCALE)
    if RESCALED:
        factor = factor * tl.load(p_rescale).to(tl.float64)
    if SCALED:
        factor = factor / tl.load(p_scale).to(tl.float64)
    skip = tl.full((), 0, tl.int1)
    if MEASURE:
        norm = tl.abs(factor) * _fold(p_partial, tl.full((), 0, tl.int64), n_partial, INF, BLOCK)
        tl.store(p_norm, norm.to(tl.float32))
        limit = tl.load(p_table + MAX_NORM)
        clip = limit / (norm + 1e-6)  # the words of torch.nn.utils.clip_grad_norm_: a NaN norm makes a NaN factor
        clip = tl.where(clip > 1.0, 1.0, clip)
        factor = factor * tl.where(limit > HUGE, 1.0, clip)
        if CHECK:
            skip = (norm <= HUGE) == 0
    if LOSS:
        skip = skip | ((tl.abs(tl.load(p_loss).to(tl.float64)) <= HUGE) == 0)
    if STICKY:  # after one refused step all are, until the host has heard of it
        skip = skip | (tl.load(p_skips) > 0)
    tl.store(p_verdict + FACTOR, factor.to(tl.float32))
    tl.store(p_verdict + SKIP, skip.to(tl.float32))
    tl.store(p_verdict + LIMIT, tl.load(p_table + CLIP_VALUE).to(tl.float32))
    tl.store(p_skipped, skip.to(tl.int32))
    tl.store(p_skips, tl.load(p_skips) + skip.to(tl.int32))
    if SCALED:  # torch's _amp_update_scale_
        scale = tl.load(p_scale)
        clean = tl.load(p_tracker) + 1
        grown = (scale.to(tl.float64) * tl.load(p_table + GROWTH)).to(tl.float32)
        grow = clean.to(tl.float64) == tl.load(p_table + INTERVAL)
        larger = tl.where(grow & (grown <= 3.4028234663852886e38), grown, scale)
        smaller = (scale.to(tl.float64) * tl.load(p_table + BACKOFF)).to(tl.float32)
        tl.store(p_scale, tl.where(skip, smaller, larger))
        tl.store(p_tracker, tl.where(skip | grow, 0, clean))
    lane = tl.arange(0, ROWS)
    start = tl.full((), 0, tl.int64)
    while start < n_rows:
        _record_rows(p_table, p_rows, start + lane, n_rows, p_record, skip, RULE)
        start += ROWS


@triton.jit
def _record_rows(p_table, p_rows, i_row, n_rows, p_record, skip, RULE: tl.constexpr):
    group = tl.load(p_rows + i_row * ROW + GROUP, mask=i_row < n_rows, other=-1)
    live = group >= 0
    p_step = tl.load(p_rows + i_row * ROW + STEP, mask=live, other=0)
    counted = live & (p_step != 0)
    p_step = p_step.to(tl.pointer_type(tl.float32))
    before = tl.load(p_step, mask=counted, other=0.0)
    tl.store(p_step, tl.where(skip, before, before + 1), mask=counted)
    p_hyper = p_table + KNOBS + group * HYPER
    p_out = p_record + i_row * RECORD
    lr = tl.load(p_hyper + LR, mask=live, other=0.0)
    decay = tl.load(p_hyper + DECAY, mask=live, other=0.0)
    sign = tl.load(p_hyper + SIGN, mask=live, other=0.0)
    decoupled = tl.load(p_hyper + DECOUPLED, mask=live, other=0.0) != 0
    tl.store(p_out + KEEP, tl.where(decoupled, 1.0 - lr * decay, 1.0).to(tl.float32), mask=live)
    tl.store(p_out + L2, tl.where(decoupled, 0.0, decay).to(tl.float32), mask=live)
    tl.store(p_out + RATE, lr.to(tl.float32), mask=live)
    tl.store(p_out + TURN, sign.to(tl.float32), mask=live)
    if RULE == 0:
        dampening = tl.load(p_hyper + DAMPENING, mask=live, other=0.0)
        undamped = tl.where(before == 0, 1.0, 1.0 - dampening)  # a buffer's first value is the gradient itself
        tl.store(p_out + UNDAMPED, undamped.to(tl.float32), mask=live)
        tl.store(p_out + INERTIA, tl.load(p_hyper + MOMENTUM, mask=live, other=0.0).to(tl.float32), mask=live)
    else:
        beta1 = tl.load(p_hyper + BETA1, mask=live, other=0.0)
        beta2 = tl.load(p_hyper + BETA2, mask=live, other=0.0)
        tl.store(p_out + B1, beta1.to(tl.float32), mask=live)
        tl.store(p_out + WEIGHT1, (1.0 - beta1).to(tl.float32), mask=live)
        tl.store(p_out + B2, beta2.to(tl.float32), mask=live)
        tl.store(p_out + WEIGHT2, (1.0 - beta2).to(tl.float32), mask=live)
    if RULE == 1:  # beta**step as exp(step * log(beta)) in double: off by 1e-13 of itself at most
        taken = (before + 1).to(tl.float64)
        power1 = tl.exp(taken * tl.load(p_hyper + LOG1, mask=live, other=-1.0))
        power2 = tl.exp(taken * tl.load(p_hyper + LOG2, mask=live, other=-1.0))
        tl.store(p_out + SIZE, (lr / (1.0 - power1)).to(tl.float32), mask=live)
        tl.store(p_out + ROOT, (1.0 / tl.sqrt(1.0 - power2)).to(tl.float32), mask=live)
        tl.store(p_out + EPSILON, tl.load(p_hyper + EPS, mask=live, other=1.0).to(tl.float32), mask=live)


@triton.jit
def _update(
    p_p, p_g, p_s0, p_s1, p_s2, p_m, at, mask, factor, limit,
    keep, l2, weight1, beta1, beta2, weight2, eps, size, root, undamped, rate, inertia,
    MODE: tl.constexpr, MASTERED: tl.constexpr, ZERO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g = _get(p_g, at, mask, MASKED) * factor
    g = tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))  # NaN stays NaN
    if MASTERED:
        w = _get(p_m, at, mask, MASKED)
    else:
        w = _get(p_p, at, mask, MASKED)
    if MODE == LION:
        m = _get(p_s0, at, mask, MASKED)
        c = beta1 * m + weight1 * g
        w = w * keep - tl.where(c > 0, rate, tl.where(c < 0, -rate, 0.0))
        _put(p_s0, at, beta2 * m + weight2 * g, mask, MASKED)
    elif MODE == ADAM or MODE == AMSGRAD:
        g = g + l2 * w
        m = _get(p_s0, at, mask, MASKED)
        m = m + (g - m) * weight1
        v = _get(p_s1, at, mask, MASKED) * beta2 + (g * g) * weight2
        _put(p_s0, at, m, mask, MASKED)
        _put(p_s1, at, v, mask, MASKED)
        if MODE == AMSGRAD:
            v = tl.maximum(_get(p_s2, at, mask, MASKED), v)
            _put(p_s2, at, v, mask, MASKED)
        w = w * keep - (size * m) / (tl.sqrt(v) * root + eps)
    else:
        g = g + l2 * w
        if MODE != SGD:
            m = inertia * _get(p_s0, at, mask, MASKED) + undamped * g
            _put(p_s0, at, m, mask, MASKED)
            if MODE == NESTEROV:
                g = g + inertia * m
            else:
                g = m
        w = w - rate * g
    _put(p_p, at, w, mask, MASKED)
    if MASTERED:
        _put(p_m, at, w, mask, MASKED)
    if ZERO:
        _put(p_g, at, tl.zeros_like(w), mask, MASKED)


@triton.jit(do_not_specialize=["last"])
def update_chunks(
    p_rows, p_chunks, p_record, p_verdict, last,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, MODE: tl.constexpr, MASTERED: tl.constexpr, ZERO: tl.constexpr,
    ALIGN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of weights and state; from the last to the first, whose gradients the norm has just left in the cache."""
    i = last - tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_chunks + i * 3)
    start = tl.load(p_chunks + i * 3 + 1)
    count = tl.load(p_chunks + i * 3 + 2)
    lane = tl.arange(0, BLOCK)
    p_g = tl.multiple_of(_cell(p_rows, i_row, GRAD, G) + start, ALIGN)
    if tl.load(p_verdict + SKIP) == 0:
        p_p = tl.multiple_of(_cell(p_rows, i_row, PARAM, P) + start, ALIGN)
        p_s0 = tl.multiple_of(_cell(p_rows, i_row, SLOT0, S) + start, ALIGN)
        p_s1 = tl.multiple_of(_cell(p_rows, i_row, SLOT1, S) + start, ALIGN)
        p_s2 = tl.multiple_of(_cell(p_rows, i_row, SLOT2, S) + start, ALIGN)
        p_m = tl.multiple_of(_cell(p_rows, i_row, MASTER, tl.float32) + start, ALIGN)
        p_r = p_record + i_row * RECORD
        factor = tl.load(p_verdict + FACTOR) * tl.load(p_r + TURN)
        limit = tl.load(p_verdict + LIMIT)
        # What a mode has no use for is loaded here and dropped by the compiler.
        keep, l2, rate, inertia, undamped = (
            tl.load(p_r + KEEP),
            tl.load(p_r + L2),
            tl.load(p_r + RATE),
            tl.load(p_r + INERTIA),
            tl.load(p_r + UNDAMPED),
        )
        w1, b1, b2, w2 = tl.load(p_r + WEIGHT1), tl.load(p_r + B1), tl.load(p_r + B2), tl.load(p_r + WEIGHT2)
        eps, size, root = tl.load(p_r + EPSILON), tl.load(p_r + SIZE), tl.load(p_r + ROOT)
        if count == CHUNK:
            for j in tl.range(0, CHUNK, BLOCK, num_stages=1):
                _update(p_p, p_g, p_s0, p_s1, p_s2, p_m, j + lane, lane < 0, factor, limit,
                        keep, l2, w1, b1, b2, w2, eps, size, root, undamped, rate, inertia, MODE, MASTERED, ZERO, False)  # fmt: skip
        else:
            for j in tl.range(0, CHUNK, BLOCK, num_stages=1):
                _update(p_p, p_g, p_s0, p_s1, p_s2, p_m, j + lane, j + lane < count, factor, limit,
                        keep, l2, w1, b1, b2, w2, eps, size, root, undamped, rate, inertia, MODE, MASTERED, ZERO, True)  # fmt: skip
    elif ZERO:
        for j in tl.range(0, CHUNK, BLOCK, num_stages=1):
            _put(p_g, j + lane, tl.zeros([BLOCK], tl.float32), j + lane < count, True)

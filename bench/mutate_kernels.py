"""Removes one term at a time from a copy of the kernels and shows that the tests notice each.

    python bench/mutate_kernels.py native           # all mutants of one source; exit status 1 when one survives
    python bench/mutate_kernels.py triton clip      # those whose name holds a word

Triton's are tested in its interpreter (`tests/kernels/interpreted`), the native ones with a library built from the mutated source.
"""

# ruff: noqa: E501 - a mutant is one line: what stands there, and what is put in its place
from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`, at every place it stands."""

    name: str
    file: str
    old: str
    new: str


def _of(file: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, file, old, new) for name, old, new in changes]


JUDGE = "fasttrain/kernels/triton_kernels.py"
UNSCALE = "    if SCALED:\n        factor = factor / tl.load(p_scale).to(tl.float64)\n"
RESCALE = "    if RESCALED:\n        factor = factor * tl.load(p_rescale).to(tl.float64)\n"
TRITON = [
    *_of(
        JUDGE,
        ("unscale", UNSCALE, ""),
        ("rescale tensor", RESCALE, ""),
        ("grad_scale", "factor = tl.load(p_table + GRAD_SCALE)", "factor = tl.load(p_table + GRAD_SCALE) * 0.0 + 1.0"),
        ("clip", "factor = factor * tl.where(limit > HUGE, 1.0, clip)", "factor = factor"),
        ("clip above one", "clip = tl.where(clip > 1.0, 1.0, clip)", "clip = clip"),
        ("clip 1e-6", "limit / (norm + 1e-6)", "limit / norm"),
        ("clip of scaled norm", "norm = tl.abs(factor) * _fold(", "norm = 1.0 * _fold("),
        ("clip by value above", "tl.where(g > limit, limit, ", "tl.where(g > limit, g, "),
        ("clip by value below", "tl.where(g < -limit, -limit, g)", "g"),
        ("skip on norm", "skip = (norm <= HUGE) == 0", "skip = skip"),
        ("skip on loss", "    if LOSS:\n        skip = skip | ((tl.abs(tl.load(p_loss).to(tl.float64)) <= HUGE) == 0)\n", ""),
        ("skip forgets the norm", "skip = skip | ((tl.abs(tl.load(p_loss)", "skip = ((tl.abs(tl.load(p_loss)"),
        ("skip is written", "tl.store(p_verdict + SKIP, skip.to(tl.float32))", "tl.store(p_verdict + SKIP, 0.0)"),
        ("skip count", "tl.store(p_skips, tl.load(p_skips) + skip.to(tl.int32))", "tl.store(p_skips, skip.to(tl.int32))"),
        ("skipped flag", "tl.store(p_skipped, skip.to(tl.int32))", "tl.store(p_skipped, 0)"),
        ("step count on a skip", "tl.where(skip, before, before + 1)", "before + 1"),
        ("step count", "tl.where(skip, before, before + 1)", "before"),
        ("backoff", "tl.store(p_scale, tl.where(skip, smaller, larger))", "tl.store(p_scale, larger)"),
        ("growth", "larger = tl.where(grow & ", "larger = tl.where((grow == 0) & grow & "),
        ("growth past the largest float", " & (grown <= 3.4028234663852886e38)", ""),
        ("clean steps after a skip", "tl.where(skip | grow, 0, clean)", "tl.where(grow, 0, clean)"),
        ("clean steps after growth", "tl.where(skip | grow, 0, clean)", "tl.where(skip, 0, clean)"),
        ("bias correction 1", "lr / (1.0 - power1)", "lr / (1.0 - 0.0 * power1)"),
        ("bias correction 2", "tl.sqrt(1.0 - power2)", "tl.sqrt(1.0 - 0.0 * power2)"),
        ("bias correction one late", "taken = (before + 1).to", "taken = (before + 2).to"),
        ("decoupled decay", "tl.where(decoupled, 1.0 - lr * decay, 1.0)", "tl.where(decoupled, 1.0, 1.0)"),
        ("coupled decay", "tl.where(decoupled, 0.0, decay)", "tl.where(decoupled, 0.0, 0.0 * decay)"),
        ("both decays", "tl.where(decoupled, 0.0, decay)", "decay"),
        ("maximize", "tl.store(p_out + TURN, sign.to(tl.float32), mask=live)", "tl.store(p_out + TURN, sign.to(tl.float32) * sign.to(tl.float32), mask=live)"),
        ("dampening", "tl.where(before == 0, 1.0, 1.0 - dampening)", "tl.where(before == 0, 1.0, 1.0)"),
        ("first momentum", "tl.where(before == 0, 1.0, 1.0 - dampening)", "1.0 - dampening"),
        ("momentum", "m = inertia * _get(p_s0, at, mask, MASKED) + undamped * g", "m = undamped * g"),
        ("momentum kept", "            _put(p_s0, at, m, mask, MASKED)\n            if MODE == NESTEROV", "            if MODE == NESTEROV"),
        ("nesterov", "g = g + inertia * m", "g = m"),
        ("amsgrad", "v = tl.maximum(_get(p_s2, at, mask, MASKED), v)", "v = _get(p_s2, at, mask, MASKED) * 0.0 + v"),
        ("amsgrad kept", "            _put(p_s2, at, v, mask, MASKED)\n", ""),
        ("eps", "(tl.sqrt(v) * root + eps)", "(tl.sqrt(v) * root)"),
        ("first moment kept", "        _put(p_s0, at, m, mask, MASKED)\n        _put(p_s1, at, v, mask, MASKED)\n", "        _put(p_s1, at, v, mask, MASKED)\n"),
        ("second moment kept", "        _put(p_s0, at, m, mask, MASKED)\n        _put(p_s1, at, v, mask, MASKED)\n", "        _put(p_s0, at, m, mask, MASKED)\n"),
        ("second moment squared", "(g * g) * weight2", "tl.abs(g) * weight2"),
        ("lion's sign of zero", "tl.where(c < 0, -rate, 0.0)", "-rate"),
        ("lion's first beta", "c = beta1 * m + weight1 * g", "c = beta2 * m + weight2 * g"),
        ("lion's second beta", "_put(p_s0, at, beta2 * m + weight2 * g, mask, MASKED)", "_put(p_s0, at, c, mask, MASKED)"),
        ("lion's decay", "w = w * keep - tl.where(c > 0", "w = w - tl.where(c > 0"),
        ("master read", "w = _get(p_m, at, mask, MASKED)", "w = _get(p_p, at, mask, MASKED)"),
        ("master written", "    if MASTERED:\n        _put(p_m, at, w, mask, MASKED)\n", ""),
        ("zeroing", "    if ZERO:\n        _put(p_g, at, tl.zeros_like(w), mask, MASKED)\n", ""),
        ("zeroing on a skip", "    elif ZERO:\n", "    elif False:\n"),
        ("second chunk of the norm", "_cell(p_rows, i_row, GRAD, G) + tl.load(p_chunks + i * 3 + 1)", "_cell(p_rows, i_row, GRAD, G)"),
        ("second chunk of the update", "start = tl.load(p_chunks + i * 3 + 1)", "start = tl.load(p_chunks + i * 3 + 1) * 0"),
        ("last chunk's mask in the norm", "x = tl.load(p_g + j + lane, mask=j + lane < count, other=0.0).to(tl.float32)", "x = tl.load(p_g + j + lane).to(tl.float32)"),
        ("last chunk's mask in the update", "j + lane, j + lane < count, factor", "j + lane, j + lane < CHUNK, factor"),
        ("full chunks only", "    if count == CHUNK:\n        for j in tl.range(0, CHUNK, BLOCK, num_stages=1):\n            x", "    if count == CHUNK:\n        for j in tl.range(0, CHUNK - BLOCK, BLOCK, num_stages=1):\n            x"),
        ("double where float overflows", "if ((result > 1e-30) & (result < 1e37)) == 0:", "if result != result:"),
        ("NaN in the largest", "result = tl.where(tl.sum(b_bad, axis=0) > 0, float(\"nan\"), most)", "result = most"),
        ("NaN among the chunks", "result = tl.where(tl.sum(b_bad, axis=0) > 0, float(\"nan\"), tl.max(b_all, axis=0))", "result = tl.max(b_all, axis=0)"),
        ("more partial sums than a block", "        start += BLOCK\n    if INF:", "        start += stop\n    if INF:"),
        ("more rows than a block", "        start += ROWS\n", "        start += n_rows\n"),
        ("each row's own norm", "tl.load(p_span + i_row * 2 + 1), INF", "tl.load(p_span + i_row * 2) + 1, INF"),
        ("each row's norm unscaled", "(tl.abs(factor) * value)", "(value)"),
    ),
    *_of(
        "fasttrain/kernels/triton_tail.py",
        ("upload in sync", "        for binding in self._captured:\n            binding.upload()\n", ""),
        ("table in sync", "        self._upload()\n        self._make_spare()\n", "        self._make_spare()\n"),
        ("loaded state in a capture", "                binding.pending.append((binding.rows, cells_of(rows, len(self._params))))\n                binding.held", "                binding.held"),
        ("moved gradients", "            self._binding.pending.append((self._binding.rows, cells_of(rows, len(self._params))))\n", "            pass\n"),
        ("alignment of gradients", "align=min(kind.align, alignment([address]))", "align=kind.align"),
        ("new momentum after a refresh", "if self._made.get(i) is not state.get(\"momentum_buffer\"):", "if True:"),
        ("zeroing of what was copied", "            for original in copied:\n                original.zero_()\n", "            pass\n"),
    ),
    *_of("fasttrain/kernels/wide_state.py", ("masters when loading", "        for index, held in wide.items():\n", "        for index, held in ():\n")),
]  # fmt: skip
TAIL, ARITHMETIC = "fasttrain/kernels/native/tail.cpp", "fasttrain/kernels/native/kernels.cpp"
NATIVE = [
    *_of(
        TAIL,
        ("unscale", "update(*plan, *call, share, call->grad_scale * verdict.clip)", "update(*plan, *call, share, verdict.clip)"),
        ("clip", "call->grad_scale * verdict.clip", "call->grad_scale"),
        ("clip above one", "verdict.clip = clip > 1.0 ? 1.0 : clip;", "verdict.clip = clip;"),
        ("clip 1e-6", "call.max_norm / (verdict.norm + 1e-6)", "call.max_norm / verdict.norm"),
        ("clip of scaled norm", "std::fabs(call.grad_scale) * ", ""),
        ("skip on norm", "verdict.skip = (call.flags & kCheck) && !std::isfinite(verdict.norm);", "verdict.skip = false;"),
        ("skip on loss", "if ((call.flags & kCheck) && call.loss &&", "if (false && call.loss &&"),
        ("skip unchecked", "verdict.skip = (call.flags & kCheck) && ", "verdict.skip = "),
        ("step count on a skip", "  if (plan->verdict.skip) return kSkipped;\n  count_steps(*plan, *call);", "  count_steps(*plan, *call);\n  if (plan->verdict.skip) return kSkipped;"),
        ("step count", "    if (row.step_is_double) *static_cast<double *>(row.step) += 1;\n    else *static_cast<float *>(row.step) += 1;\n", ""),
        ("bias correction 1", "c.lr / (1.0 - std::pow(group.beta1, step))", "c.lr"),
        ("bias correction 2", "1.0 / std::sqrt(1.0 - std::pow(group.beta2, step))", "1.0"),
        ("decoupled decay", "c.decay = decoupled ? 1.0 - c.lr * group.weight_decay : 1.0;", "c.decay = 1.0;"),
        ("coupled decay", "c.l2 = decoupled ? 0.0 : group.weight_decay;", "c.l2 = 0.0;"),
        ("both decays", "c.l2 = decoupled ? 0.0 : group.weight_decay;", "c.l2 = group.weight_decay;"),
        ("maximize", "group.flags & kMaximize ? -factor : factor", "factor"),
        ("dampening", "c.undamped = 1.0 - group.dampening;", "c.undamped = 1.0;"),
        ("nesterov", "if (group.flags & kNesterov) return", "if (false) return"),
        ("first momentum", "    return row.fresh ? kFirstMomentum : kMomentum;".strip(), "return kMomentum;"),
        ("amsgrad", "group.flags & kAmsgrad ? kAmsgradAdam : kPlainAdam", "kPlainAdam"),
        ("zeroing", "    if (call.flags & kZeroGrads) zero(row, chunk, grad);\n", ""),
        ("zeroing on a skip", "else if (call->flags & kZeroGrads) clear(*plan, *call, share);", ""),
        ("second chunk", "chunk.offset * kItemSize[dtype]", "0 * chunk.offset * kItemSize[dtype]"),
        ("gradients of their own dtype", "row.grad_dtype == row.dtype ? active->update[mode][row.dtype] : active->update_mixed[mode]", "active->update[mode][row.dtype]"),
        ("each row's own norm", "call.norms_out[row] = static_cast<float>(norm_of(plan, call, first, last));", "call.norms_out[row] = static_cast<float>(norm_of(plan, call, first, first + 1));"),
        ("rows without a gradient", "    if (!grad) continue;\n", ""),
        ("waiting between the passes", "      wait_for_all(threads);\n", ""),
    ),
    *_of(
        ARITHMETIC,
        ("clip by value above", "x > limit ? limit : x", "x"),
        ("clip by value below", "below < -limit ? -limit : below", "below"),
        ("momentum", "momentum * F::load(buffer[i]) + undamped * grad", "undamped * grad"),
        ("amsgrad's largest", "v = before > v ? before : v;", ""),
        ("eps", "(root(v) * inverse_root + eps)", "(root(v) * inverse_root)"),
        ("double where float overflows", "!(sum > 1e-30 && sum < 1e37)", "sum != sum"),
        ("the last partial lanes", "fetch_rest<F>(read, x + i, stop - i);", ""),
        ("NaN in the largest", "    if (bad[i] != bad[i]) return static_cast<double>(bad[i]);\n", ""),
        ("lion's sign of zero", "way < 0 ? lr : C(0)", "way <= 0 ? lr : C(0)"),
        ("lion's first beta", "beta1 * m + weight1 * grad", "beta2 * m + weight2 * grad"),
        ("lion's second beta", "F::store(beta2 * m + weight2 * grad)", "F::store(way)"),
        ("lion's decay", "F::load(p[i]) * decay - (up - down)", "F::load(p[i]) - (up - down)"),
    ),
    *_of(
        "fasttrain/kernels/native/numbers.h",
        ("bfloat16 rounds to even", "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "(u + 0x8000u) >> 16"),
        ("bfloat16 rounds", "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "u >> 16"),
    ),
    *_of("fasttrain/kernels/native/machine.h", ("subnormals", "saved_ | 0x8040u", "saved_ | 0u")),
]  # fmt: skip


FIRST = (  # the quickest tests that tell most, before the rest of the file
    "unscaled_moments", "norm_and_clip_see_scaled_gradients", "limits_at_their_ends", "the_loss_scale_is_grad_scalers", "a_bad_loss_skips",
    "nothing_beyond_a_tensor_is_touched", "norms", "zeroed_gradients", "a_bad_first_step_is_none", "tables_of_a_capture_are_written_after_it",
    "norm_neither_over_nor_underflows", "step_counts_of_their_own", "hyperparameters_may_change_every_step", "groups_and_dtypes_in_one_plan",
    "masters_survive_loading", "master_weights", "more_than_a_block_of_everything", "lion_stands_still_at_zero",
    "only_what_is_aligned_is_loaded_wide", "a_bad_gradient_changes_no_bit", "what_moved_is_noticed", "misaligned_views", "two_runs_are_bitwise_equal",
)  # fmt: skip


def passes(tests: list[str], tree: Path) -> bool:
    """Whether these tests pass, in a child that has torch imported already but nothing of the tree."""
    child = os.fork()
    if child == 0:
        outcome = 99
        try:
            said = os.open(tree / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.chdir(tree)
            sys.path.insert(0, str(tree))
            signal.alarm(1800)  # a mutant that never ends is caught too
            outcome = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--tb=no", *tests]))
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(outcome)
    status = os.waitpid(child, 0)[1]
    outcome = os.waitstatus_to_exitcode(status)  # a mutant that dies of a signal is caught
    if outcome > 0 and outcome != int(pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"the tests did not run (exit status {outcome}):\n{(tree / 'said.txt').read_text()[-3000:]}")
    return outcome == 0


def prepare(interpret: bool) -> None:
    """Imports once what every child needs."""
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    for name in ("torch._dynamo", *(("triton",) if interpret else ())):  # torch and its slow half
        importlib.import_module(name)


def survives(mutant: Mutant, source: str, tree: Path) -> bool:
    """Whether every test passes with this mutant."""
    path = tree / mutant.file
    text = path.read_text()
    if mutant.old not in text:
        raise SystemExit(f"{mutant.name}: {mutant.old!r} is not in {mutant.file} any more")
    path.write_text(text.replace(mutant.old, mutant.new))
    interpreted = "tests/kernels/interpreted/test_interpreted.py"
    native = sorted(str(p.relative_to(tree)) for p in (tree / "tests/kernels").glob("test_native*.py"))
    stages = [[f"{interpreted}::test_{name}" for name in FIRST], [interpreted]] if source == "triton" else [native]
    try:
        if source == "native":
            built = subprocess.run(["cmake", "--build", str(tree / "build")], capture_output=True, text=True)
            if built.returncode:
                raise SystemExit(f"{mutant.name} does not compile:\n{built.stdout[-2000:]}")
        return all(passes(tests, tree) for tests in stages)
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=["triton", "native"])
    parser.add_argument("words", nargs="*", help="only mutants whose name holds them all")
    parser.add_argument("--part", default="0/1", help="k/n: every n-th mutant from the k-th, for several processes")
    asked = parser.parse_args()
    part, parts = map(int, asked.part.split("/"))
    survivors, count = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        for name in ("fasttrain", "tests", "pyproject.toml", "CMakeLists.txt"):
            here = ROOT / name
            if here.is_dir():
                shutil.copytree(here, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(here, tree / name)
        for source, mutants in (("triton", TRITON), ("native", NATIVE)):
            chosen = [m for m in mutants if all(word in m.name for word in asked.words)][part::parts]
            if asked.source != source or not chosen:
                continue
            prepare(interpret=source == "triton")
            if source == "native":
                subprocess.run(["cmake", "-S", str(tree), "-B", str(tree / "build")], check=True, capture_output=True)
            for mutant in chosen:
                began = time.perf_counter()
                alive = survives(mutant, source, tree)
                count += 1
                print(f"{source:6} {'SURVIVES' if alive else 'caught':8} {time.perf_counter() - began:6.1f} s  {mutant.name}", flush=True)
                if alive:
                    survivors.append(f"{source}: {mutant.name}")
    print(f"{count - len(survivors)} of {count} mutants caught" + "".join(f"\n  survived: {s}" for s in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

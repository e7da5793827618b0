"""The report puts what refused, then what lost, above what won; both kinds of file give the same rows."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from bench.chart import svg
from bench.report import page, records_of, rows_of, starts, table, write
from bench.sides.table import SIDES, why_not
from bench.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent.parent


def record(us: float, **more: Any) -> dict[str, Any]:
    return {"us": us, "best_us": us, "first_round_s": 1.0, "peak_mb": 200.0, "calls_a_step": 12.0, "reads_a_step": 0.0, **more}


RECORDS: dict[str, dict[str, dict[str, Any]]] = {
    "logistic_regression": {"plain": record(200), "fasttrain": record(50), "lightning": record(700)},
    "char_gpt": {"plain": record(110), "fasttrain": record(100), "plain-compiled": record(96), "lightning": record(120)},
    "autoencoder": {"plain": record(150), "fasttrain": record(100), "ignite": {"refused": "ignite and plain do not train alike."}},
    "dcgan": {"plain": record(90), "fasttrain": record(100), "keras-torch": {"skipped": "one loss only"}},
}
KEPT = {"records": RECORDS, "machine": {"date": "2000-01-02", "device": "cpu"}, "command": "c"}


def test_losers_on_top() -> None:
    """Workloads stand in the order of their worst case for us, the quickest side of each first, and those we lost are listed before."""
    rows = rows_of(KEPT)
    order = list(dict.fromkeys(r.workload for r in rows))
    assert order == ["dcgan", "char_gpt", "autoencoder", "logistic_regression"]
    assert [r.side for r in rows if r.workload == "char_gpt"] == ["plain-compiled", "fasttrain", "plain", "lightning"]
    text = table(rows)
    places = [text.index(s) for s in (
        "**refused**: ignite and plain", "dcgan: plain takes 0.90", "char_gpt: plain-compiled takes 0.96",
        "| dcgan | **100** | 0.90x (plain)",
        "| logistic_regression | **50** | 4.00x", "one loss only: dcgan / keras-torch",
    )]  # fmt: skip
    assert places == sorted(places)
    assert "logistic_regression: plain takes" not in text


def test_a_rung_of_ours_is_no_loss() -> None:
    """A named rung that beats ``auto`` is ours too: it is in the table and not among the cases we lost."""
    rows = rows_of({"records": {"vit": {"fasttrain": record(100), "fasttrain-compile": record(90), "plain": record(120)}}})
    assert not any(r.lost for r in rows)
    assert rows[0].side == "fasttrain-compile"


def test_without_ours_no_ratio() -> None:
    """Where fasttrain refused there is nothing to divide by: microseconds stand there, and nobody has lost or won."""
    rows = rows_of({"records": {"vit": {"fasttrain": {"refused": "it failed."}, "plain": record(120)}}})
    assert all(r.ratio is None for r in rows)
    assert "120 µs (plain)" in table(rows)


def test_both_files_give_the_same_rows() -> None:
    """pytest-benchmark's JSON, with what was not measured beside its rows, reads as the comparison's does."""
    benchmarks = [
        {"extra_info": {"workload": w, "side": s, "record": r}} for w, group in RECORDS.items() for s, r in group.items() if "us" in r
    ]
    missing = [[w, s, r] for w, group in RECORDS.items() for s, r in group.items() if "us" not in r]
    start = {"workload": "vit", "start_of": "plain", "cold_s": 3.0, "warm_s": 2.0, "imports_s": 1.5}
    kept = {"benchmarks": [*benchmarks, {"extra_info": start}], "not_measured": missing}
    assert records_of(kept) == RECORDS
    assert rows_of(kept) == rows_of(KEPT)
    assert "| vit | plain | 3.00 | 2.00 | 1.50 |" in starts(kept)


def test_chart_and_page_are_written(tmp_path: Path) -> None:
    """A dated Markdown, an SVG that parses with a dot for every ratio, and a JSON that can be read again."""
    path = write(KEPT, tmp_path)
    assert path.name == "2000-01-02-suite-cpu.md"
    assert "2000-01-02-suite-cpu.svg" in path.read_text()
    drawn = ET.fromstring(path.with_suffix(".svg").read_text())
    titles = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert "plain-compiled: 0.96x" in titles
    assert len(titles) == sum(r.ratio is not None and not r.side.startswith("fasttrain") for r in rows_of(KEPT))
    assert rows_of(json.loads(path.with_suffix(".json").read_text())) == rows_of(KEPT)
    assert svg([]).startswith("<svg")
    assert "shows that the rows run" in page(KEPT | {"quick": True})


def test_what_is_not_measured_is_said() -> None:
    """A missing peer, a form that a framework has not and a device that is not here each have their sentence; the rest have none."""
    absent = lambda package: None  # noqa: E731
    present = lambda package: object()  # noqa: E731
    assert why_not(WORKLOADS["vit"], "lightning", "cpu", absent) == "pytorch_lightning is not installed: pip install '.[bench]'"
    assert "one loss and one optimizer" in why_not(WORKLOADS["dcgan"], "keras-torch", "cpu", present)
    assert why_not(WORKLOADS["vit"], "captured-by-hand", "cpu", present) == "no CUDA device here"
    assert "too large for a CPU" in why_not(WORKLOADS["gpt2_124m"], "fasttrain", "cpu", present)
    for name, w in WORKLOADS.items():
        for side, made in SIDES.items():
            on_gpu = why_not(w, side, "cuda", present)
            assert bool(on_gpu) == (
                bool(w.variant and not made.variants) or w.form not in made.forms or bool(w.sides and side not in w.sides)
                or (w.precision, side) == ("16-mixed", "captured-by-hand")
            ), f"{name} / {side}: {on_gpu}"  # fmt: skip


def test_qualify_refuses_without_a_device(tmp_path: Path) -> None:
    """On a machine without a CUDA device the script says so in one sentence, writes nothing and exits with 3."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    script = ROOT / "bench" / "gpu" / "qualify.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_qualify_record_puts_failures_on_top(tmp_path: Path) -> None:
    """Parts that failed or ran out of time are named before any figure, and the training table keeps its losers on top."""
    from bench.gpu.record import page as gpu_page
    from bench.gpu.record import record as gpu_record

    (tmp_path / "parts.tsv").write_text("tests\t1\t9\tpytest\nkernels\t124\t90\tkernels\ntraining\t0\t60\tcompare\n")
    for name in ("tests", "kernels", "training"):
        (tmp_path / f"{name}.log").write_text(f"first\nlast of {name}\n")
    (tmp_path / "training.json").write_text(json.dumps(KEPT))
    (tmp_path / "kernels.md").write_text(f"{sys.executable} bench/kernels.py --out {tmp_path}/kernels.md")
    kept = gpu_record(tmp_path)
    text = gpu_page(kept)
    wanted = ("**tests: with 1.**", "**kernels: its time was over.**", "last of training", "dcgan: plain takes 0.90")
    places = [text.index(s) for s in wanted]
    assert places == sorted(places)
    assert json.loads(json.dumps(kept)) == kept
    assert str(tmp_path) not in text, "a machine path in a result"

"""What every test shares: one thread, so that sums add up in one order, and the slow half on request."""

from __future__ import annotations

import os

import pytest
import torch

# Child processes import the package that is installed, as these tests do, not the tree they happen to start in.
os.environ["PYTHONSAFEPATH"] = "1"

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A bare ``pytest``, which is the whole suite, runs in two processes: most of it waits for the compiler. ``-n 0`` is one."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of the two
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.usepdb and not config.option.collectonly
    if whole and getattr(config.option, "numprocesses", 0) is None and (os.cpu_count() or 1) > 1:
        config.option.numprocesses, config.option.dist, config.option.tx = 2, "load", ["popen", "popen"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what repeats a law at a cost: more modules compiled, more resume points")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: repeats a law on more modules; run with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    kept = [i for i in items if "slow" not in i.keywords]
    config.hook.pytest_deselected(items=[i for i in items if "slow" in i.keywords])
    items[:] = kept


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

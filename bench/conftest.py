"""Options of ``pytest bench``, and what its JSON says beside the timings: the machine, and which rows were not measured and why."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from bench.machine import device, machine

NOT_MEASURED: list[tuple[str, str, dict[str, Any]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("training bench")
    group.addoption("--quick", action="store_true", help="tiny sizes, one round: does every row run?")
    group.addoption("--rounds", type=int, default=5, help="timed rounds of a side, all sides interleaved (5)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if str(item.path).startswith(str(config.rootpath / "bench")):
                item.add_marker(pytest.mark.timeout(0))  # a workload's sides are measured together, before the first of its rows


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fasttrain_bench"] = machine(device())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["not_measured"] = NOT_MEASURED
    output_json["quick"] = config.getoption("--quick")
    output_json["command"] = " ".join(["pytest", *sys.argv[1:]])

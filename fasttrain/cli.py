"""The command line: ``fasttrain demo``, ``fasttrain env``, ``fasttrain explain``; torch is imported after the first line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fasttrain import __version__
from fasttrain.errors import FasttrainError, OptionError, reject

NOT_CAPTURED, FAILED, INTERRUPTED = 1, 2, 128 + int(signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 after an error of ours or a wrong argument, 130 after ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except FasttrainError as error:
        print(f"fasttrain: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("fasttrain: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fasttrain", description="One captured training step for the module you already have.")
    parser.add_argument("--version", action="version", version=f"fasttrain {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train a small GPT on the source of Python's standard library")
    demo.add_argument("--max-time", type=_seconds, default=180.0, metavar="SECONDS", help="training time, compiling apart (default: 180)")
    demo.add_argument("--size", choices=("small", "base"), help="about 1 or 10 million parameters (default: small)")
    demo.add_argument("--out", type=Path, default=Path("fasttrain-demo"), metavar="DIR", help="default: ./fasttrain-demo")
    demo.add_argument("--seed", type=int, help="default: 0")
    demo.add_argument("--capture", choices=("auto", "eager", "compile", "graph"), default="auto", help="default: auto")
    demo.add_argument("--precision", help="32-true, bf16-mixed, ... (default: bf16-mixed where the hardware has it)")
    demo.add_argument("--resume", action="store_true", help="go on from the newest checkpoint below --out")
    demo.set_defaults(run=_demo)

    env = commands.add_parser("env", help="print what a bug report needs")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=_env)

    explain = commands.add_parser("explain", help="capture one step of your module and say what was captured and what was not")
    explain.add_argument(
        "factory", metavar="MODULE:FACTORY", help="a function that returns (module, train_loader) or (module, train_loader, options)"
    )
    explain.set_defaults(run=_explain)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    print(f"fasttrain {__version__} demo: a byte-level GPT on the source of Python's standard library", flush=True)
    # Threads that wait give their core away sooner: on 2 cores that others use too, a step took 77 ms and not 382.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from fasttrain.demo.run import demo

    finished = demo(
        out=arguments.out,
        max_time=arguments.max_time,
        size=arguments.size,
        seed=arguments.seed,
        capture=arguments.capture,
        precision=arguments.precision,
        resume=arguments.resume,
    )
    return 0 if finished else INTERRUPTED


def _env(arguments: argparse.Namespace) -> int:
    from fasttrain.env import facts, line

    if arguments.json:
        print(json.dumps(dict(facts()), indent=2))
        return 0
    for name, value in facts():
        print(line(name, value), flush=True)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    print(f"fasttrain {__version__}: capturing one step of {arguments.factory}", flush=True)
    module, loader, options = _made_by(arguments.factory)
    from fasttrain.errors import CaptureError
    from fasttrain.fit import compile_fit
    from fasttrain.graphs.cut import CUT_THERE

    quiet = {"max_steps": 1, "max_epochs": -1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        trainer = compile_fit(module, **({"capture": "compile"} | options | quiet))
        trainer.fit(loader)
    except CaptureError as error:
        print(f"{error}\nUnder capture='auto' this module trains on the next rung that can be had.")
        return NOT_CAPTURED
    print(trainer.explain())
    assert trainer.result is not None
    return NOT_CAPTURED if any(o.done in ("", CUT_THERE) for o in trainer.result.capture.obstacles) else 0


def _made_by(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """What the factory ``pkg.mod:function`` returned, as (module, loader, options). Modules beside the caller are found."""
    wanted = "MODULE:FACTORY, e.g. my_project.train:make"
    file, _, function = name.partition(":")
    if not file or not function:
        raise OptionError(reject("the factory", repr(name), wanted, "Name a function that takes no argument."))
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(import_module(file), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise OptionError(reject("the factory", f"{name!r} ({error})", wanted, "Call it from the folder your module is in.")) from error
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance((*made, {})[2], dict):
        raise OptionError(
            reject(f"what {name} returned", type(made).__name__, "(module, loader) or (module, loader, options)", "Return those.")
        )
    return made[0], made[1], dict((*made, {})[2])


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"got {text}; wanted a number of seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())

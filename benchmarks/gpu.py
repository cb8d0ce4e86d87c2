"""Everything that is measured on a GPU, one program after the other: JSON lines as they come, a table last.

A program that fails, takes too long, or has nothing to run with, costs its own lines only; what was left out is said.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.peers.compare import peer_python
from corpora.errors import Parser, run_program
from corpora.paths import outputs_dir

ROOT = Path(__file__).resolve().parents[1]
PEER = os.environ.get("PEER_PYTHON") or str(peer_python("llmcompressor"))  # an interpreter that has llm-compressor
HARDWARE = ("processor", "cores", "gpu", "torch", "commit", "date", "benchmark", "device")


@dataclass(frozen=True)
class Step:
    """A program and its options; seconds after which it is stopped; what it needs besides torch."""

    name: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()


STEPS = (  # those that say most come first: the first three take 158 s on an H200, the others 154 s
    Step("gptq", ("benchmarks.peers.blocks", "--device", "cuda", "--peer-python", PEER), 150, (PEER,)),
    Step("products", ("benchmarks.products", "--device", "cuda", "--quick"), 60, ("triton",)),
    Step("lutgemm", ("benchmarks.lutgemm", "--device", "cuda"), 50, ("triton",)),
    Step("overhead", ("benchmarks.overhead", "--device", "cuda", "--shape", "8b", "--blocks", "32", "--rounds", "3",
                      "--prompts", "512", "2048", "8192", "--prefixes", "1", "34", "--new", "16"), 80),
    Step("spqr", ("benchmarks.spqr", "--device", "cuda"), 30, ("triton",)),
    Step("kv_decode", ("benchmarks.kv_decode", "--device", "cuda", "--rounds", "5", "--tokens", "32768", "--batch", "1",
                       "--policies", "per_head 4", "kivi 2", "turboquant 4bit-nc"), 40, ("triton",)),
    Step("memory", ("benchmarks.memory", "--device", "cuda", "--recipe", "gptq", "--samples", "128",
                    "--length", "2048", "--shape", "70b"), 120),
    Step("walk", ("benchmarks.gptq_walk", "--device", "cuda"), 40),
)  # fmt: skip


def missing(step: Step) -> list[str]:
    """What a step needs and this machine lacks: modules, or the file of an interpreter."""
    found = (shutil.which(name) if "/" in name else find_spec(name) for name in step.needs)
    return [name for name, there in zip(step.needs, found, strict=True) if not there]


def figures(step: Step, log: Path) -> list[dict[str, Any]]:
    """Run one step and print its lines. Its whole output goes to the log."""
    lines: list[dict[str, Any]] = []
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as errors:
        # A session of its own, so that a program that is stopped takes with it what it has started.
        child = subprocess.Popen(
            [sys.executable, "-m", *step.command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        assert child.stdout is not None
        timer = threading.Timer(step.seconds, os.killpg, (child.pid, signal.SIGKILL))
        timer.start()
        for line in child.stdout:
            errors.write(line)
            if line.startswith("{"):
                lines.append(json.loads(line))
                print(line, end="", flush=True)
        code = child.wait()
        timer.cancel()
    if code:
        late = time.monotonic() - started >= step.seconds
        why = f"stopped after {step.seconds} s" if late else f"ended with {code}"
        print(f"{step.name}: {why}; its output is in {log}", file=sys.stderr)
    return lines


def print_table(lines: list[dict[str, Any]]) -> None:
    """One aligned block for every kind of figure."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        shown = {key: value for key, value in line.items() if key not in HARDWARE}
        kinds.setdefault((line.get("benchmark"), *shown), []).append(shown)
    for (kind, *columns), rows in kinds.items():
        cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        print(f"\n{kind}")
        for row in cells:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def main() -> None:
    """Run the chosen steps."""
    parser = Parser(prog="bash benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="only these (default: all)")
    options = parser.parse_args()
    place = outputs_dir() / "benchmarks"
    place.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in STEPS:
        if options.steps and step.name not in options.steps:
            continue
        if lacks := missing(step):
            print(f"{step.name}: left out, {', '.join(lacks)} is not installed", file=sys.stderr)
            continue
        started = time.monotonic()
        lines += figures(step, place / f"gpu-{step.name}.log")
        print(f"{step.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    (place / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print_table(lines)


if __name__ == "__main__":
    run_program(main)

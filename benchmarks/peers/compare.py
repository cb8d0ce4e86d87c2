"""Our GPTQ and AWQ beside llm-compressor's and gptqmodel's: the same model, token ids, bits and groups.

Every quantization is a process of its own, in its own environment; rounds alternate, medians are printed. Seconds are
those that each reports for the quantization itself, without imports and loading. All results, ours and theirs, are
evaluated by `python -m eval ppl`.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.measure import ratio, report
from corpora.errors import Parser, UserError, run_program
from corpora.paths import outputs_dir
from corpora.text import calibration_segments

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS = ("llmcompressor", "gptqmodel")
METHODS = ("gptq", "awq")
DAMP = 0.01  # as in common.py, which the peers read
OURS = "ours"
COLUMNS = ("method", "by", "perplexity", "vs ours", "seconds", "ours/peer", "MB")


def peer_python(peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return ROOT / ".venv-peers" / peer / "bin" / "python"


def chosen_peers(names: list[str] | None) -> list[str]:
    """The peers to run: those asked for, or all that are installed. Raises UserError if one that must be is not."""
    missing = [peer for peer in names or PEERS if not (peer_python(peer).parents[1] / "installed").is_file()]
    if missing and (names or len(missing) == len(PEERS)):
        raise UserError(
            f"no environment of {', '.join(missing)}; make it with: bash benchmarks/peers/setup.sh {missing[0]}"
        )
    for peer in missing:
        print(f"left out: {peer}, not installed (bash benchmarks/peers/setup.sh {peer})", file=sys.stderr)
    return [peer for peer in names or PEERS if peer not in missing]


def our_command(options: Namespace, method: str, out: Path) -> list[str]:
    """Our quantization as a command."""
    settings = ["calibration.draw=segments"]
    if options.symmetric:
        settings.append("weights.grid.convention=gptq-sym")
    elif method == "gptq":
        settings.append("weights.grid.convention=gptq-asym")
    if method == "gptq":
        settings += [
            f"weights.damp={DAMP}",
            f"weights.act_order={str(options.act_order == 'static').lower()}",
            "weights.static_groups=true",
            f"weights.true_sequential={str(options.true_sequential).lower()}",
        ]
    return [
        *(sys.executable, "-m", "quantization", "--model", str(options.model), "--recipe", method, "--out", str(out)),
        *("--bits", str(options.bits), "--group-size", str(options.group_size)),
        *("--calibration", options.corpus, "--calibration-samples", str(options.samples)),
        *("--calibration-length", str(options.length), "--seed", str(options.seed)),
        *(word for setting in settings for word in ("--set", setting)),
    ]


def peer_command(options: Namespace, method: str, peer: str, segments: Path, out: Path) -> list[str]:
    """A peer's quantization as a command."""
    return [
        *(str(peer_python(peer)), str(HERE / f"run_{peer}.py"), "--model", str(options.model), "--out", str(out)),
        *("--segments", str(segments), "--method", method, "--batch-size", str(options.batch_size)),
        *("--bits", str(options.bits), "--group-size", str(options.group_size), "--act-order", options.act_order),
        *(["--symmetric"] if options.symmetric else []),
        *(["--true-sequential"] if options.true_sequential and method == "gptq" else []),
    ]


def run(command: list[str], log: Path) -> None:
    """Run a command, its output in a file. Raises UserError, with the last line of it, if it fails."""
    with log.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = log.read_text(errors="replace").rstrip().splitlines()[-20:]
        print("\n".join(tail), file=sys.stderr)
        raise UserError(
            f"{Path(command[0]).name} {' '.join(command[1:])} ended with {done.returncode}; its last lines are above"
        )


def perplexity(options: Namespace, model: Path) -> float:
    """What `eval ppl` says of a checkpoint. A new run record is removed again: the checkpoint will not last."""
    known = set((outputs_dir() / "runs").glob("ppl-*.json"))
    command = [
        *(sys.executable, "-m", "eval", "ppl", "--model", str(model), "--corpus", options.corpus, "--json"),
        *("--window", str(options.window), "--limit", str(options.limit)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"evaluating {model} failed: {done.stderr.strip().splitlines()[-1]}")
    record = json.loads(done.stdout)
    if Path(record["path"]) not in known:
        Path(record["path"]).unlink(missing_ok=True)
    return float(record["perplexity"])


def quantized(options: Namespace, method: str, arm: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """Quantize once, afresh: the directory, and what it reports about itself."""
    out = work / f"{method}-{arm}"
    shutil.rmtree(out, ignore_errors=True)
    command = (
        our_command(options, method, out)
        if arm == OURS
        else peer_command(options, method, arm, work / "segments.safetensors", out)
    )
    run(command, work / f"{method}-{arm}.log")
    return out, json.loads((out / ("checksums.json" if arm == OURS else "peer.json")).read_text())


@contextmanager
def work_directory(kept: Path | None) -> Iterator[Path]:
    """Where results go: `kept`, or a directory that is removed at the end."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    outputs_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peers-", dir=outputs_dir()) as name:
        yield Path(name).resolve()


def compare(options: Namespace, method: str, peers: list[str], work: Path) -> list[tuple[str, ...]]:
    """All arms of one method: prints a JSON line per peer, returns the rows of the table."""
    arms = [OURS, *peers]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    losses: dict[str, float] = {}
    last: dict[str, dict[str, Any]] = {}
    for i in range(options.repeat):
        for arm in arms if i % 2 == 0 else arms[::-1]:
            print(f"{method}, round {i + 1} of {options.repeat}: {arm}", file=sys.stderr)
            out, last[arm] = quantized(options, method, arm, work)
            seconds[arm].append(last[arm]["seconds"])
            if arm not in losses:
                losses[arm] = perplexity(options, out)
            if options.work is None:
                shutil.rmtree(out)
    rows = []
    for arm in arms:
        faster = "" if arm == OURS else f"{ratio(seconds[OURS], seconds[arm]):.2f}"
        relative = "" if arm == OURS else f"{losses[arm] / losses[OURS] - 1:+.1%}"
        middle = statistics.median(seconds[arm])
        megabytes = round(last[arm]["peak_memory_mb"])
        rows.append((method, arm, f"{losses[arm]:.2f}", relative, f"{middle:.1f}", faster, str(megabytes)))
    for peer in peers:
        report(
            benchmark="peers",
            method=method,
            peer=peer,
            model=options.model.name,
            **{name: getattr(options, name) for name in ("bits", "group_size", "symmetric", "act_order")},
            **{name: getattr(options, name) for name in ("true_sequential", "batch_size", "corpus", "samples")},
            **{name: getattr(options, name) for name in ("length", "seed", "window", "limit", "repeat")},
            perplexity=round(losses[OURS], 4),
            peer_perplexity=round(losses[peer], 4),
            perplexity_ratio=round(losses[OURS] / losses[peer], 4),
            seconds=round(statistics.median(seconds[OURS]), 2),
            peer_seconds=round(statistics.median(seconds[peer]), 2),
            seconds_ratio=round(ratio(seconds[OURS], seconds[peer]), 3),
            peak_memory_mb=round(last[OURS]["peak_memory_mb"]),
            peer_peak_memory_mb=round(last[peer]["peak_memory_mb"]),
            threads=last[peer]["threads"],
            peer_versions=last[peer]["versions"],
            peer_settings=last[peer]["settings"],
        )
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    """One aligned line per row, text left, numbers right."""
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    for row in [COLUMNS, *rows]:
        cells = (cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())


def main() -> None:
    """Draw the segments, run every arm, print."""
    parser = Parser(prog="python -m benchmarks.peers.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "modelzoo/smollm2/smollm2-135m", metavar="DIR")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: those that are installed")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument("--act-order", choices=["none", "static"], default="static", help="of gptq (default: static)")
    parser.add_argument("--true-sequential", action="store_true", help="of gptq; llmcompressor has no such mode")
    parser.add_argument("--corpus", default="sample", help="to calibrate and to evaluate on (default: sample)")
    parser.add_argument("--samples", type=int, default=16, help="calibration segments (default: 16)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a segment (default: 512)")
    parser.add_argument("--seed", type=int, default=42, help="of the draw of segments (default: 42)")
    parser.add_argument("--batch-size", type=int, default=1, help="segments per forward pass of the peers (default: 1)")
    parser.add_argument("--window", type=int, default=512, help="of the evaluation (default: 512)")
    parser.add_argument("--limit", type=int, default=8, help="windows of the evaluation (default: 8)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; seconds are medians (default: 1)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep results and logs here (default: nothing is kept)"
    )
    options = parser.parse_args()
    options.model = options.model.resolve()
    if options.repeat < 1:
        raise UserError(f"--repeat {options.repeat} leaves nothing to do; give 1 or more")
    peers = chosen_peers(options.peers)
    if options.true_sequential and "llmcompressor" in peers and "gptq" in options.methods:
        raise UserError("llmcompressor cannot calibrate within a block; with --true-sequential use --peers gptqmodel")
    with work_directory(options.work) as work:
        segments = calibration_segments(
            AutoTokenizer.from_pretrained(options.model, trust_remote_code=False),
            options.corpus,
            samples=options.samples,
            length=options.length,
            seed=options.seed,
        )
        save_file({"segments": segments.contiguous()}, work / "segments.safetensors")
        rows = [("-", "full precision", f"{perplexity(options, options.model):.2f}", "", "", "", "")]
        for method in options.methods:
            rows += compare(options, method, peers, work)
    print_table(rows)


if __name__ == "__main__":
    run_program(main)

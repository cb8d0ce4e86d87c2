"""Our GPTQ beside llm-compressor's on a few random decoder blocks of a large model's shape, on a GPU if there is one.

Both quantize the same checkpoint on the same token ids, in alternating processes. Seconds are each one's own, without
imports: ours with reading the checkpoint and writing the result, theirs without. The error is that of the last hidden
states on other ids: ‖h − h₀‖/‖h₀‖, h₀ of the full-precision model.
"""

import json
import shutil
import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.measure import ratio, report
from benchmarks.memory import SHAPES, VOCABULARY, write_random_checkpoint
from benchmarks.peers.compare import DAMP, HERE, peer_python, run
from corpora.errors import Parser, run_program
from quantization.named import named_recipe
from quantization.recipes.recipe import with_settings
from quantization.runs.checkpoint import load_quantized
from quantization.runs.pipeline import quantize_checkpoint

OURS = ("ours", "ours, one pass a block")  # the second is what the peer does: no linear waits for an earlier one


def quantize(options: Namespace, true_sequential: bool, segments: Path, source: Path, out: Path) -> None:
    """What a child process of ours does."""
    settings = [
        f"weights.grid.bits={options.bits}",
        f"weights.grid.group_size={options.group_size}",
        "weights.grid.convention=gptq-asym",
        f"weights.damp={DAMP}",
        f"weights.true_sequential={str(true_sequential).lower()}",
    ]
    recipe = with_settings(named_recipe("gptq"), settings)
    quantize_checkpoint(source, recipe, out, segments=load_file(segments)["segments"], device=options.device)


def ours(options: Namespace, arm: str, work: Path) -> list[str]:
    """Our command."""
    return [
        *(sys.executable, "-m", "benchmarks.peers.blocks", "--device", options.device, "--bits", str(options.bits)),
        *("--group-size", str(options.group_size), "--child", "one" if arm == OURS[1] else "sets"),
        *(str(work / "segments.safetensors"), str(work / "model"), str(work / arm.replace(" ", "-"))),
    ]


def theirs(options: Namespace, work: Path) -> list[str]:
    """The peer's command."""
    python = options.peer_python or str(peer_python("llmcompressor"))
    return [
        *(python, str(HERE / "run_llmcompressor.py"), "--model", str(work / "model"), "--dtype", "bfloat16"),
        *("--segments", str(work / "segments.safetensors"), "--method", "gptq", "--bits", str(options.bits)),
        *("--group-size", str(options.group_size), "--act-order", "static"),
        *("--batch-size", str(options.batch_size), "--out", str(work / "llmcompressor")),
    ]


@torch.inference_mode()
def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the last block, float32."""
    return model.model(ids.to(model.device)).last_hidden_state.float()


def write_model(options: Namespace, directory: Path) -> None:
    """A random checkpoint, with a tokenizer, which the peer asks for."""
    write_random_checkpoint(directory, options.shape, options.blocks, options.device)
    index = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            index |= dict.fromkeys(opened.keys(), file.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(directory)


def measure(options: Namespace, work: Path) -> None:
    """All arms, and a line for each of ours."""
    write_model(options, work / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (options.samples + 1, options.length), generator=generator)
    save_file({"segments": ids[:-1].contiguous()}, work / "segments.safetensors")
    seconds: dict[str, list[float]] = {}
    megabytes: dict[str, float] = {}
    errors: dict[str, float] = {}
    dense = AutoModelForCausalLM.from_pretrained(work / "model", dtype="auto", trust_remote_code=False)
    truth = hidden_states(dense.to(options.device), ids[-1:])
    del dense
    for i in range(options.repeat):
        arms = [*options.arms, "llmcompressor"]
        for arm in arms if i % 2 == 0 else arms[::-1]:
            out = work / arm.replace(" ", "-")
            shutil.rmtree(out, ignore_errors=True)
            run(theirs(options, work) if arm not in OURS else ours(options, arm, work), Path(f"{out}.log"))
            cost = json.loads((out / ("checksums.json" if arm in OURS else "peer.json")).read_text())
            seconds.setdefault(arm, []).append(cost["seconds"])
            megabytes[arm] = cost["peak_memory_mb"]
            if arm not in errors:
                if arm in OURS:
                    model = load_quantized(out, device=options.device)
                else:
                    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=False)
                states = hidden_states(model.to(options.device), ids[-1:])
                errors[arm] = float((states - truth).norm() / truth.norm())
                del model
    for arm in options.arms:
        report(
            benchmark="gptq_blocks",
            by=arm,
            **{name: getattr(options, name) for name in ("shape", "blocks", "bits", "group_size", "samples", "length")},
            seconds=round(statistics.median(seconds[arm]), 2),
            peer_seconds=round(statistics.median(seconds["llmcompressor"]), 2),
            seconds_ratio=round(ratio(seconds[arm], seconds["llmcompressor"]), 3),
            error=round(errors[arm], 4),
            peer_error=round(errors["llmcompressor"], 4),
            peak_memory_mb=round(megabytes[arm]),
            peer_peak_memory_mb=round(megabytes["llmcompressor"]),
            peer_batch_size=options.batch_size,
        )


def main() -> None:
    """Write the model, run every arm, print."""
    parser = Parser(prog="python -m benchmarks.peers.blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="8b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--arms", nargs="+", choices=OURS, default=OURS, help="of ours (default: both)")
    parser.add_argument("--batch-size", type=int, default=1, help="segments per forward pass of the peer (default: 1)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; seconds are medians (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer-python", help="interpreter of the peer (default: .venv-peers/llmcompressor)")
    parser.add_argument("--child", nargs=4, help="of this program: what a child process does")
    options = parser.parse_args()
    if options.child:
        mode, *paths = options.child
        quantize(options, mode == "sets", *(Path(path) for path in paths))
        return
    with tempfile.TemporaryDirectory(prefix="blocks-") as work:
        measure(options, Path(work))


if __name__ == "__main__":
    run_program(main)

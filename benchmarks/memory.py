"""Peak memory of quantizing few and many decoder blocks of one shape: the pipeline holds one block, so it must not
grow with their number. Methods that calibrate may hold two blocks, the text's hidden states and four Hessians."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.measure import peak_unshared_mb, report
from quantization.named import RECIPES, named_recipe
from quantization.recipes.recipe import with_settings
from quantization.runs.dense import empty_model
from quantization.runs.pipeline import quantize_checkpoint

SHAPES = {
    "small": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
BLOCKS = {"small": (8, 32), "8b": (2, 4)}
VOCABULARY = 1000


def write_random_checkpoint(directory: Path, shape: str, blocks: int) -> None:
    """A LLaMA checkpoint of random bfloat16 weights, one file per block, with a vocabulary of 1000."""
    directory.mkdir()
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=blocks, vocab_size=VOCABULARY, dtype=torch.bfloat16)
    config.save_pretrained(directory)
    state = empty_model(directory).state_dict()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, meta in state.items():
        file = "-".join(name.split(".")[1:3]) if ".layers." in name else "ends"
        parts.setdefault(file, {})[name] = meta
    for file, tensors in parts.items():
        random = {name: torch.randn(t.shape, dtype=torch.bfloat16) * 0.02 for name, t in tensors.items()}
        save_file(random, directory / f"{file}.safetensors")


def quantize(recipe: str, source: Path, out: Path, samples: int, length: int, settings: list[str]) -> None:
    """What a child process does: quantize with random ids as calibration text."""
    ids = torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(0))
    quantize_checkpoint(source, with_settings(named_recipe(recipe), settings), out, segments=ids)


def limit_mb(shape: str, samples: int, length: int, calibrates: bool) -> float:
    """Two blocks in bfloat16, and for methods that calibrate the hidden states twice and four of the largest Hessian in
    float32; without what the interpreter and the libraries take."""
    hidden, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    kv = hidden // SHAPES[shape]["num_attention_heads"] * SHAPES[shape]["num_key_value_heads"]
    block = 2 * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inner)
    text = 2 * samples * length * hidden * 2 + 4 * inner**2 * 4 if calibrates else 0
    return (2 * block + text) / 1e6


def main() -> None:
    """Measure the chosen shapes and recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES], help="only this one (default: both)")
    parser.add_argument(
        "--recipe", action="append", choices=[*RECIPES], help="several times for several (default: rtn)"
    )
    parser.add_argument("--samples", type=int, default=4, help="calibration samples (default: 4)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: 128)")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("FEW", "MANY"), help="(small: 8 32, 8b: 2 4)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    recipes = options.recipe or ["rtn"]
    if options.child:
        quantize(recipes[0], *options.child, options.samples, options.length, options.settings)
        return
    alone = peak_unshared_mb([sys.executable, "-c", "import benchmarks.memory"])
    for shape, counts in BLOCKS.items():
        if options.shape not in (None, shape):
            continue
        counts = options.blocks or counts
        for recipe in recipes:
            peaks = []
            for blocks in counts:
                with tempfile.TemporaryDirectory() as place:
                    directory = Path(place) / "model"
                    write_random_checkpoint(directory, shape, blocks)
                    command = [sys.executable, "-m", "benchmarks.memory", "--recipe", recipe]
                    command += ["--samples", str(options.samples), "--length", str(options.length)]
                    for setting in options.settings:
                        command += ["--set", setting]
                    peaks.append(peak_unshared_mb([*command, "--child", str(directory), str(Path(place) / "out")]))
            calibrates = named_recipe(recipe).checkpoint_part.calibrates
            report(
                benchmark="memory",
                recipe=recipe,
                shape=shape,
                blocks=list(counts),
                tokens=[options.samples, options.length] if calibrates else None,
                peak_mb=[round(p) for p in peaks],
                imports_mb=round(alone),
                limit_mb=round(alone + limit_mb(shape, options.samples, options.length, calibrates)),
                growth=round(peaks[1] / peaks[0] - 1, 4),
            )


if __name__ == "__main__":
    main()

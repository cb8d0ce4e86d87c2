"""Peak memory of quantizing few and many decoder blocks of one shape: the pipeline holds one block, so it must not
grow with their number."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.measure import peak_unshared_mb, report
from quantization.checkpoint import empty_model

SHAPES = {
    "small": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}


def write_random_checkpoint(directory: Path, shape: str, blocks: int) -> None:
    """A LLaMA checkpoint of random bfloat16 weights, one file per block, with a vocabulary of 1000."""
    directory.mkdir()
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=blocks, vocab_size=1000, dtype=torch.bfloat16)
    config.save_pretrained(directory)
    state = empty_model(directory).state_dict()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, meta in state.items():
        file = "-".join(name.split(".")[1:3]) if ".layers." in name else "ends"
        parts.setdefault(file, {})[name] = meta
    for file, tensors in parts.items():
        random = {name: torch.randn(t.shape, dtype=torch.bfloat16) * 0.02 for name, t in tensors.items()}
        save_file(random, directory / f"{file}.safetensors")


def main() -> None:
    """Measure both shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES], help="only this one (default: both)")
    options = parser.parse_args()
    for shape, counts in (("small", (8, 32)), ("8b", (2, 4))):
        if options.shape not in (None, shape):
            continue
        peaks = []
        for blocks in counts:
            with tempfile.TemporaryDirectory() as place:
                directory = Path(place) / "model"
                write_random_checkpoint(directory, shape, blocks)
                command = [
                    sys.executable,
                    "-m",
                    "quantization",
                    "--model",
                    str(directory),
                    "--recipe",
                    "rtn",
                    "--bits",
                    "4",
                    "--group-size",
                    "64",
                    "--device",
                    "cpu",
                    "--out",
                    str(Path(place) / "quantized"),
                ]
                peaks.append(peak_unshared_mb(command))
        report(
            benchmark="memory",
            shape=shape,
            blocks=list(counts),
            peak_mb=[round(p) for p in peaks],
            growth=round(peaks[1] / peaks[0] - 1, 4),
        )


if __name__ == "__main__":
    main()

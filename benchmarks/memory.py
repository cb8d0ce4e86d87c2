"""Peak memory of quantizing few and many decoder blocks of one shape: the pipeline holds one block, so it must not
grow with their number. Methods that calibrate may hold two blocks, the text's hidden states and four Hessians.

On a GPU (`--device cuda`) the peaks are that of its memory and that of the host's, and what a whole model of the shape
takes is said by arithmetic: the peak of many blocks is the model's, as a block leaves nothing behind but its file; its
embeddings and head, which the random checkpoint has small, are added on either side.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
}
BLOCKS = {"cpu": {"small": (8, 32), "8b": (2, 4)}, "cuda": {"8b": (1, 2), "70b": (1,)}}
WHOLE = {"8b": 32, "70b": 80}  # blocks of the model
REAL_VOCABULARY = 128_256  # of LLaMA 3
VOCABULARY = 1000
GPU_GB, HOST_GB = 80, 64  # that a whole model should fit into


def write_random_checkpoint(directory: Path, shape: str, blocks: int, device: str = "cpu") -> None:
    """A LLaMA checkpoint of random bfloat16 weights, one file per block, with a vocabulary of 1000. device: that makes
    the numbers."""
    directory.mkdir()
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=blocks, vocab_size=VOCABULARY, dtype=torch.bfloat16)
    config.save_pretrained(directory)
    state = empty_model(directory).state_dict()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, meta in state.items():
        file = "-".join(name.split(".")[1:3]) if ".layers." in name else "ends"
        parts.setdefault(file, {})[name] = meta
    for file, tensors in parts.items():
        random = {n: torch.randn(t.shape, dtype=torch.bfloat16, device=device) * 0.02 for n, t in tensors.items()}
        save_file({name: tensor.cpu() for name, tensor in random.items()}, directory / f"{file}.safetensors")
    if device != "cpu":
        torch.cuda.empty_cache()


def quantize(options: argparse.Namespace, source: Path, out: Path) -> None:
    """What a child process does: quantize with random ids as calibration text, and leave what it took beside `out`."""
    shape = (options.samples, options.length)
    ids = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    recipe = with_settings(named_recipe((options.recipe or ["rtn"])[0]), options.settings)
    start = time.perf_counter()
    quantize_checkpoint(source, recipe, out, segments=ids, device=options.device)
    took: dict[str, float] = {"seconds": time.perf_counter() - start}
    if options.device != "cpu":
        took["gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
        took["gpu_reserved_mb"] = torch.cuda.max_memory_reserved() / 1e6
        # Pinned memory is none of the process's anonymous pages.
        took["pinned_mb"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) / 1e6
    out.with_suffix(".json").write_text(json.dumps(took), encoding="utf-8")


def block_mb(shape: str) -> float:
    """One block in bfloat16."""
    hidden, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    kv = hidden // SHAPES[shape]["num_attention_heads"] * SHAPES[shape]["num_key_value_heads"]
    return 2 * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inner) / 1e6


def limit_mb(shape: str, samples: int, length: int, calibrates: bool) -> float:
    """Two blocks in bfloat16, and for methods that calibrate the hidden states twice and four of the largest Hessian in
    float32; without what the interpreter and the libraries take."""
    hidden, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    text = 2 * samples * length * hidden * 2 + 4 * inner**2 * 4 if calibrates else 0
    return 2 * block_mb(shape) + text / 1e6


def whole_model(shape: str, blocks: int, gpu_mb: float, host_mb: float) -> dict[str, Any]:
    """What a model of this shape, with its embeddings and head, takes in GB, and what is left of a GPU and a host.

    blocks: that were measured. One alone has none that is written meanwhile (weights and their codes, on the GPU), and
    none that is read ahead. The embeddings are on the GPU only before the first block, where less else is; they and the
    head are in host memory while they are written."""
    if blocks == 1:
        gpu_mb, host_mb = gpu_mb + 1.5 * block_mb(shape), host_mb + block_mb(shape)
    gpu, host = gpu_mb / 1e3, (host_mb + 2 * 2 * REAL_VOCABULARY * SHAPES[shape]["hidden_size"] / 1e6) / 1e3
    return {
        "blocks": WHOLE[shape],
        "gpu_gb": round(gpu, 1),
        "host_gb": round(host, 1),
        f"left_of_{GPU_GB}_gb_gpu": round(GPU_GB - gpu, 1),
        f"left_of_{HOST_GB}_gb_host": round(HOST_GB - host, 1),
    }


def main() -> None:
    """Measure the chosen shapes and recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=[*BLOCKS], default="cpu", help="(default: cpu)")
    parser.add_argument("--shape", choices=[*SHAPES], help="only this one (default: two of each device)")
    parser.add_argument(
        "--recipe", action="append", choices=[*RECIPES], help="several times for several (default: rtn)"
    )
    parser.add_argument("--samples", type=int, default=4, help="calibration samples (default: 4)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: 128)")
    parser.add_argument(
        "--blocks",
        type=int,
        nargs="+",
        metavar="N",
        help="few and many, or one number (small: 8 32, 8b: 2 4; on a GPU 8b: 1 2, 70b: 1)",
    )
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no GPU is here")
        return
    if options.child:
        quantize(options, *options.child)
        return
    on_gpu, limits = options.device != "cpu", {}
    alone = 0.0 if on_gpu else peak_unshared_mb([sys.executable, "-c", "import benchmarks.memory"])
    for shape, usual in BLOCKS[options.device].items() if not options.shape else [(options.shape, (1, 2))]:
        counts = options.blocks or BLOCKS[options.device].get(shape, usual)
        for recipe in options.recipe or ["rtn"]:
            peaks, took = [], []
            for blocks in counts:
                with tempfile.TemporaryDirectory() as place:
                    directory, out = Path(place) / "model", Path(place) / "out"
                    write_random_checkpoint(directory, shape, blocks, options.device)
                    command = [sys.executable, "-m", "benchmarks.memory", "--recipe", recipe]
                    command += ["--samples", str(options.samples), "--length", str(options.length)]
                    command += ["--device", options.device]
                    for setting in options.settings:
                        command += ["--set", setting]
                    peaks.append(peak_unshared_mb([*command, "--child", str(directory), str(out)]))
                    took.append(json.loads(out.with_suffix(".json").read_text(encoding="utf-8")))
            calibrates = named_recipe(recipe).checkpoint_part.calibrates
            figures: dict[str, Any] = {name: [round(x[name], 1) for x in took] for name in took[0]}
            if on_gpu and shape in WHOLE:
                host = peaks[-1] + took[-1]["pinned_mb"]
                limits = {"whole_model": whole_model(shape, counts[-1], took[-1]["gpu_reserved_mb"], host)}
            elif not on_gpu:
                limit = alone + limit_mb(shape, options.samples, options.length, calibrates)
                limits = {"imports_mb": round(alone), "limit_mb": round(limit)}
            report(
                benchmark="memory",
                recipe=recipe,
                shape=shape,
                blocks=list(counts),
                tokens=[options.samples, options.length] if calibrates else None,
                peak_mb=[round(p) for p in peaks],
                growth=round(peaks[-1] / peaks[0] - 1, 4) if len(peaks) > 1 else None,
                **figures,
                **limits,
            )


if __name__ == "__main__":
    main()

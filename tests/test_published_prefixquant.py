"""The published trainable-prefix command of PrefixQuant's fork, at reduced sizes: a call of ours for each of its steps.

docs/prefixquant.md has the command, and what every option of it is called here.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT

from eval.__main__ import main as evaluate
from intactkv.__main__ import main as intactkv
from intactkv.prefix import Prefix
from quantization.runs.checkpoint import block_file, read_block, read_manifest

PAGE = (ROOT / "docs" / "prefixquant.md").read_text(encoding="utf-8")
OPTIONS = PAGE.split('export OPTIONS="')[1].split('"')[0].replace("\\\n", " ").split()
WINOGRANDE = [{"sentence": f"Ann met {i} Eves as _ was late.", "option1": "Ann", "option2": "Eve", "answer": "1"}
              for i in range(4)]  # fmt: skip
SMALL = ("--set", "tuning.epochs=2", "--set", "tuning.mse_init_size=2", "--set", "tuning.batch=2")


def test_the_programs_of_the_published_command_run_one_by_one(
    tiny_checkpoint: Callable[..., Path], intactkv_root: Path, text: Path, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    model = tiny_checkpoint(
        intactkv_root, "llama", hidden_size=128, head_dim=128, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128, num_hidden_layers=2,
    )  # fmt: skip
    trained = intactkv_root / "trained.safetensors"
    recipe = "prefixquant-w4a8kv4-dynamic"
    code, out, err = run_main(
        intactkv, "train-prefix", "--model", model, "--recipe", recipe, *OPTIONS, "--prefix", f"auto:{text}@64",
        "--corpus", text, "--samples", 4, "--held-out", 2, "--length", 32, "--prefix-len", 8, "--prefix-lr", "1e-3",
        "--prefix-epochs", 2, "--prefix-loss-type", "l2", "--batch-size", 2, "--training-seed", 42, "--out", trained,
    )  # fmt: skip
    assert code == 0, err
    made_of = Prefix.load(trained).calibrated
    assert made_of is not None
    assert (made_of["embeddings"]["length"], made_of["embeddings"]["loss"]) == (8, "l2")

    quantized = ("--model", model, "--recipe", f"{recipe}-ft", *OPTIONS, *SMALL, "--prefix", trained, "--seed", 42,
                 "--calibration", text, "--calibration-samples", 6, "--calibration-length", 32)  # fmt: skip
    code, out, err = run_main(
        evaluate, "ppl", *quantized, "--corpus", text, "--protocol", "gptq", "--window", 64, "--limit", 2, "--json"
    )
    assert code == 0, err
    record: dict[str, Any] = json.loads(out)
    assert math.isfinite(record["perplexity"])
    settings = record["settings"]
    weights, inputs, kv = (settings["recipe"][part] for part in ("weights", "activations", "kv_cache"))
    assert (weights["grid"]["bits"], weights["grid"]["group_size"], weights["grid"]["convention"]) == (
        4,
        128,
        "gptq-asym",
    )
    assert (inputs["grid"]["bits"], inputs["grid"]["group_size"], inputs["grid"]["convention"]) == (
        8,
        64,
        "minmax-asym",
    )
    assert (inputs["static"], inputs["keep"]) == (False, 0.95)
    assert (kv["kind"], kv["bits"], kv["group_size"], kv["convention"]) == ("ClippedPerHead", 8, 64, "minmax-asym")
    assert kv["rotate_keys"]
    tuning = settings["recipe"]["tuning"]
    assert (tuning["loss"], tuning["target"], tuning["weight_lr"], tuning["quant_lr"]) == (
        "mse",
        "fp_input",
        5e-6,
        5e-5,
    )
    assert (settings["recipe"]["calibration"]["seed"], settings["protocol"]) == (42, "gptq")

    (made,) = (intactkv_root / "modelzoo" / "quantized" / model.name).glob("*prefixquant*/")
    assert read_manifest(made)["needs_kv"] == Prefix.load(trained).digest()
    block = read_block(block_file(made, 0))
    assert block.figures["loss_after"] <= block.figures["loss_before"]
    # Trained shares of the ranges of inputs and values, both ends.
    shares = [x for name, x in block.parameters.items() if name.endswith((".low", ".high"))]
    assert len(shares) == 8
    assert {"values_low", "values_high"} == block.kv.keys()
    assert not torch.equal(block.kv["values_high"], torch.tensor(0.95))

    place = intactkv_root / "datasets" / "winogrande" / "dev.jsonl"
    place.parent.mkdir(parents=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in WINOGRANDE))
    code, out, err = run_main(evaluate, "tasks", *quantized, "--tasks", "winogrande", "--batch-size", 16)
    assert code == 0, err
    assert "winogrande" in out
    assert list(made.parent.glob("*prefixquant*/")) == [made]  # found again

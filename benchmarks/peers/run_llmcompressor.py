"""GPTQ and AWQ by llm-compressor, on given token ids. Runs inside .venv-peers/llmcompressor (see setup.sh).

The seconds are those of `oneshot` alone: tracing, calibration, quantization; no import, no loading, no saving.
Its own defaults stay, apart from what the options say; they are listed in `peer.json`.

One patch: before AWQ's search, llm-compressor pins the cached activations in page-locked memory without looking for a
GPU (`IntermediatesCache.pin_memory`), and torch refuses that on a machine without one. There the call does nothing.
"""

import time

from common import (  # sets the environment
    DAMP,
    device_name,
    peak_memory_mb,
    read_segments,
    runner_options,
    write_result,
)

import torch  # isort: skip
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.modifier import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def collate(segments: list[Tensor]) -> dict[str, Tensor]:
    """A batch as the model takes it. All segments are equally long, so a mask would be all ones: none is given."""
    return {"input_ids": torch.stack(segments)}


def dense_weight(linear: nn.Module) -> Tensor:
    """What a quantized linear computes with: its weight on the grid (GPTQ's already lies on it, AWQ's not yet)."""
    return forward_quantize(linear, linear.weight, "weight", linear.quantization_scheme.weights)


def main() -> None:
    """Load, quantize with a clock around it, write."""
    options = runner_options(__doc__)
    if options.true_sequential:
        raise SystemExit("error: llm-compressor calibrates whole decoder blocks; leave --true-sequential away")
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    loader = DataLoader(list(read_segments(options.segments)), batch_size=options.batch_size, collate_fn=collate)

    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": options.symmetric,
        "strategy": "channel" if options.group_size == -1 else "group",
        "group_size": None if options.group_size == -1 else options.group_size,
    }
    scheme = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    recipe: list[Modifier]
    if options.method == "gptq":
        act_order = None if options.act_order == "none" else options.act_order
        own = {"dampening_frac": DAMP, "actorder": act_order, "block_size": 128}
        recipe = [GPTQModifier(**scheme, **own)]
    else:
        own = {"duo_scaling": True, "n_grid": 20}  # its defaults: scales from activations and weights
        recipe = [AWQModifier(**own), QuantizationModifier(**scheme)]

    start = time.perf_counter()
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, dataset=loader)
    seconds, peak_mb = time.perf_counter() - start, peak_memory_mb()

    with torch.no_grad():
        parameters = dict(model.state_dict())
        for name, module in model.named_modules():
            if getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None:
                parameters[f"{name}.weight"] = dense_weight(module)
    settings = {"weights": weights, "batch_size": options.batch_size, "device": device_name(), **own}
    write_result(
        options,
        parameters,
        name="llmcompressor",
        packages=("llmcompressor", "compressed-tensors"),
        seconds=seconds,
        peak_mb=peak_mb,
        settings=settings,
    )


if __name__ == "__main__":
    main()

"""Every KV policy on every kind of weights, behind every kind of prefix, and in both storages: the same figures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_ids

from intactkv.attach import attach
from intactkv.prefix import Prefix
from quantization.kv_cache import KIVI, KVQuant, PerHead, Policy, Rotated, StaticPerHead, TurboQuant
from quantization.named import RECIPES
from quantization.recipes.recipe import Calibration, Recipe, with_settings
from quantization.runs.plan import plan_run

CPU = torch.device("cpu")
TEXT = torch.cat([torch.tensor([1]), random_ids(40, seed=7)])[None]
POLICIES: dict[str, Policy] = {
    "per_head": PerHead(3),
    "rotated": Rotated(3),
    "static": StaticPerHead(4),
    "kivi": KIVI(2, group_size=8, residual=8),
    "kvquant": KVQuant(3, weighting="none", sinks=0),
    "turboquant": TurboQuant(3),
}
FINER = {"kvquant": (4, 0.5)}  # bits, and how much of the logits may still move; others: 8 bits
SMALL = {"rtn": "weights.grid.group_size=32", "gptq": "weights.grid.group_size=32", "omni": "weights.epochs=1"}
WEIGHTS = ("fp16", "rtn-w4", "gptq-w4", "smoothquant-w8a8-qllm", "quarot", "omniquant-w4a4")


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dense"), "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "calibration.txt"
    file.write_text(" ".join(f"Line {i} of {i * i} has its own words, as {i % 7} of them do." for i in range(60)))
    return file


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_policies_go_with_weights_and_prefixes(
    weights: str, source: Path, text: Path, intactkv_root: Path, tmp_path: Path
) -> None:
    base = with_settings(
        RECIPES[weights].recipe, [setting for start, setting in SMALL.items() if weights.startswith(start)]
    )
    base = replace(base, kv_cache=None, calibration=Calibration(str(text), 2, 24, 0))
    for name, policy in POLICIES.items():
        trained = tmp_path / f"trained-{name}.safetensors"
        prefix: Prefix = plan_run(source, replace(base, kv_cache=policy, prefix="bos"), device=CPU).intact_prefix()
        calibrated: Any = replace(prefix, keys=tuple(1.01 * k for k in prefix.keys), calibrated={"steps": 1})
        calibrated.save(trained)
        scores = {}
        for word in ("none", "bos", str(trained)):
            recipe: Recipe = replace(base, kv_cache=policy, prefix=word)
            fake, packed = (plan_run(source, recipe, device=CPU, packed_kv=packed).load() for packed in (False, True))
            scores[word] = fake.score(TEXT)
            assert torch.equal(packed.score(TEXT), scores[word]), (name, word)
            assert scores[word].isfinite().all()
            exact = attach(fake.model, fake.prefix).score(TEXT)
            moved = float((scores[word] - exact)[:, 1:].norm() / exact[:, 1:].norm())
            assert 1e-3 < moved < 0.9, (name, word, moved)  # unrelated logits: √2
            if word == "bos" and (base.activations is None or base.activations.grid.bits >= 8):
                # Inputs of 4 bits make much of any change, and a policy that weights are trained with makes others.
                finer, limit = FINER.get(name, (8, 0.3))
                fine = plan_run(source, replace(recipe, kv_cache=replace(policy, bits=finer)), device=CPU).load()
                left = float((fine.score(TEXT) - exact)[:, 1:].norm() / exact[:, 1:].norm())
                assert left < min(limit, 0.8 * moved), (name, left, moved)
            answer = packed.generate(TEXT[:, :20], max_new_tokens=12, min_new_tokens=12, do_sample=False)
            assert answer.shape == (1, 32)
        assert not torch.equal(scores["none"], scores["bos"])
        assert not torch.equal(scores["bos"], scores[str(trained)])

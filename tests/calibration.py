"""What KV policies calibrate to, made without a plan, and checkpoints as they were when these held it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from intactkv.prefix import Prefix, identity_of
from quantization.recipes.recipe import Recipe, describe
from quantization.runs.checkpoint import find_checkpoint
from quantization.runs.fitting import model_of
from quantization.runs.kv_artefact import KVArtefact, calibrate_kv


def calibrated(
    directory: Path, policy: Any, path: Path, segments: Tensor, behind: Tensor | Prefix | None = None
) -> dict[int, dict[str, Tensor]]:
    """What a KV policy calibrates to on the checkpoint in a directory, by layer; it is kept at a path."""
    checkpoint = find_checkpoint(directory)
    basis = "plain" if checkpoint.manifest is None else checkpoint.manifest["basis"]
    owner = identity_of(model_of(directory, (checkpoint.fingerprint, basis)))
    wanted = KVArtefact(policy, {"kv": describe(policy), "weights": {}}, owner, "full")
    return calibrate_kv(directory, wanted, path, segments, behind).tensors


@contextmanager
def ranges_in_checkpoints() -> Iterator[None]:
    """Write checkpoints as they were before what a KV policy calibrates to became an artefact of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "trains_kv", property(lambda recipe: recipe.kv_calibrates))
        yield

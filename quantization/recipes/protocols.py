"""What a recipe is made of: the protocols of transforms, weight quantizers and block-wise training."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_type_hints

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from corpora.errors import UserError, said_by
from corpora.json_files import fitted
from intactkv.architecture import Feed
from intactkv.policy import KVPolicy
from quantization.grids.stored import Grid, StoredWeight
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer

__all__ = ["BlockTuning", "Transform", "WeightQuantizer", "restored"]


class Transform(Protocol):
    """An exact rewrite of a model: scales, rotations. Must not change the model's function in full precision.

    calibrates: whether it looks at calibration text. rescales: whether it works through `DecoderBlock.rescale` alone;
    what it applied is then kept with the block. unties: whether the head becomes another matrix than the embeddings.
    """

    name: ClassVar[str]
    calibrates: ClassVar[bool]
    rescales: ClassVar[bool]
    unties: ClassVar[bool]

    @property
    def changes_kv(self) -> bool:
        """Whether keys or values are in another basis afterwards."""
        ...

    def check(self, block: DecoderBlock) -> None:
        """Raise UserError for a block without weights (meta device) that it cannot do."""
        ...

    def rescaled_feeds(self, block: DecoderBlock) -> Sequence[Feed]:
        """The pairs between which it moves scales."""
        ...

    def rotated_inputs(self, block: DecoderBlock) -> Sequence[str]:
        """The linears that it puts an online rotation in front of."""
        ...

    def transform_block(self, block: DecoderBlock) -> None:
        """Rewrite the block's weights in place."""
        ...

    def transform_ends(self, ends: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
        """What becomes of the parameters outside the blocks, by their names (a tied head is not among them)."""
        ...

    def restructure(self, model: PreTrainedModel) -> None:
        """Exchange modules of an empty model for those that the rewritten parameters belong to."""
        ...


class WeightQuantizer(Protocol):
    """Chooses the points on the grid for the linears of one block.

    A frozen dataclass; every field is part of the checkpoint's identity and can be set with --set weights.FIELD=VALUE.
    """

    name: ClassVar[str]
    # The calibration text that it wants: passed on by quantized blocks (errors accumulate, the method can repair them),
    # by full-precision blocks, or both.
    reads: ClassVar[Literal["quantized", "full", "both"]]
    # Whether it trains with what the recipe rounds beside the weights at work (`DecoderBlock.rounding`).
    sees_rounding: ClassVar[bool]

    @property
    def grid(self) -> Grid:
        """The grid of the weights."""
        ...

    @property
    def label(self) -> str:
        """Short readable name of method and grid: `gptq-w3g128`."""
        ...

    @property
    def calibrates(self) -> bool:
        """Whether it looks at calibration text."""
        ...

    @property
    def rescales(self) -> bool:
        """Whether it rewrites the full-precision weights (DecoderBlock.rescale), so that the twin is another model."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that decide the result; their content is part of the identity."""
        ...

    def check(self, block: DecoderBlock) -> None:
        """Raise UserError for a block without weights (meta device) whose shapes it cannot do."""
        ...

    def rescaled_feeds(self, block: DecoderBlock) -> Sequence[Feed]:
        """The pairs between which it moves scales."""
        ...

    def quantize_block(self, block: DecoderBlock) -> Mapping[str, StoredWeight]:
        """Every linear of the block in its stored form, by the linear's name within the block.

        Leaves the block in full precision (rescaled, if it does that).
        """
        ...


class BlockTuning(Protocol):
    """Trains a block with its quantizers at work, and leaves its weights on their grid.

    A frozen dataclass; every field is part of the checkpoint's identity and can be set with --set tuning.FIELD=VALUE.
    """

    name: ClassVar[str]

    @property
    def reads(self) -> Literal["quantized", "full", "both"]:
        """See `WeightQuantizer`."""
        ...

    @property
    def calibrates(self) -> bool:
        """Whether it looks at calibration text."""
        ...

    def check(self, weights: WeightQuantizer | None) -> None:
        """Raise UserError for a quantizer of weights that it cannot do."""
        ...

    def check_model(self, model: type[PreTrainedModel], kv: KVPolicy | None) -> None:
        """Raise UserError for a class of models that it cannot do with this policy."""
        ...

    def tune_block(
        self,
        block: DecoderBlock,
        weights: WeightQuantizer | None,
        inputs: Mapping[tuple[str, ...], InputQuantizer],
        kv: KVPolicy | None,
    ) -> Mapping[str, StoredWeight]:
        """Every linear in its stored form, by its name within the block.

        inputs: quantizers of the sets of linears that share an input, not yet at work; their tensors may be changed in
        place. kv: the recipe's policy of new keys and values; the tensors of a calibrated one are in `block.kv`.
        What else was trained (norms, biases) stays in the block, whose quantized linears keep any value.
        """
        ...


def restored(description: Any, kinds: Mapping[str, type], what: str = "the manifest") -> Any:
    """Undo `quantization.recipes.recipe.describe`: a part of a recipe from its plain JSON.

    kinds: classes by their names. what: where it stands. Raises UserError for one that is not among them, and for
    fields that it does not have, lacks, or that are of another type.
    """
    if isinstance(description, list):
        return tuple(restored(item, kinds, what) for item in description)
    if not isinstance(description, dict):
        return description
    kind: Any = kinds.get(description["kind"])
    if kind is None:
        raise UserError(f"{what} names the part {description['kind']!r}, which is not known here; quantize again")
    hints = get_type_hints(kind)
    # Fields that were added later, and left out where they say what held before (`recipe.added`).
    told = {f.name: f.metadata["before"][0] for f in fields(kind) if "before" in f.metadata}
    for name, value in description.items():
        if name != "kind":
            told[name] = fitted(restored(value, kinds, what), hints.get(name, Any), f"{what}: {kind.__name__}.{name}")
    try:
        return kind(**told)
    except TypeError as error:
        raise UserError(f"{what} is damaged ({said_by(error)}); quantize again") from None

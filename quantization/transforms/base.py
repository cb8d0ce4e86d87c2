"""What most transforms have in common: nothing happens outside the blocks, and no module is exchanged."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from intactkv.architecture import Feed
from quantization.model.blocks import DecoderBlock

__all__ = ["BlockTransform"]


class BlockTransform:
    """Defaults of `quantization.recipes.protocols.Transform`."""

    calibrates: ClassVar[bool] = False
    rescales: ClassVar[bool] = False
    unties: ClassVar[bool] = False

    @property
    def changes_kv(self) -> bool:
        """Keys or values are in another basis afterwards."""
        return True

    def check(self, block: DecoderBlock) -> None:
        """Every block will do."""

    def rescaled_feeds(self, block: DecoderBlock) -> Sequence[Feed]:
        """None."""
        return ()

    def rotated_inputs(self, block: DecoderBlock) -> Sequence[str]:
        """None."""
        return ()

    def transform_ends(self, ends: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
        """They stay as they are."""
        return ends

    def restructure(self, model: PreTrainedModel) -> None:
        """Nothing to exchange."""

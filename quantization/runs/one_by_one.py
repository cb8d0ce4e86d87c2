"""The decoder blocks of a dense or quantized checkpoint, read one at a time, as they compute when the model runs.

Memory holds the embeddings, one block and what flows through it, never the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from intactkv.architecture import architecture_of
from intactkv.prefix import Prefix
from quantization.model.blocks import DecoderBlock
from quantization.model.stream import CalibrationStream
from quantization.recipes.protocols import restored
from quantization.runs.checkpoint import ENDS, block_file, block_state, cast, empty_quantized, is_quantized, read_block
from quantization.runs.damage import check_finite
from quantization.runs.dense import DenseCheckpoint, Weights, empty_model
from quantization.runs.manifest import PARTS

__all__ = ["Blocks"]


class Blocks:
    """The blocks of a checkpoint. model: without weights. They compute in the checkpoint's own dtype; quantized ones
    with everything that rounds when they run, but with a KV cache in full precision."""

    def __init__(self, directory: Path, device: torch.device):
        self.directory, self.device = directory, device
        self._weights: Weights | None = None
        if is_quantized(directory):
            manifest, self.model = empty_quantized(directory)
            if (attention := manifest["recipe"].get("attention")) is not None:
                restored(attention, PARTS).install(self.model)
            self.dtype = self.model.dtype
        else:
            self.model = empty_model(directory)
            self._weights = DenseCheckpoint(directory).weights(self.model)
            self.dtype = self._weights.dtype
        self.architecture = architecture_of(self.model.config)
        self._modules = self.architecture.blocks_of(self.model)

    def __len__(self) -> int:
        return len(self._modules)

    def stream(self, segments: Tensor, behind: Tensor | Prefix | None) -> CalibrationStream:
        """Text (N, T) in front of the first block. behind: as `CalibrationStream` takes it; tokens are only right where
        the blocks are in full precision."""
        start = f"{self.architecture.blocks}."
        names = [name for name in self.model.state_dict() if not name.startswith(start)]
        if self._weights is None:
            ends = cast(read_block(self.directory / ENDS).parameters, self.dtype, self.device)
        else:
            ends = {name: self._weights.tensor(name) for name in names if name in self._weights.names}
        for name, tensor in ends.items():
            check_finite(tensor, f"{self.directory}: the tensor {name!r}")
            owner, _, parameter = name.rpartition(".")
            setattr(self.model.get_submodule(owner), parameter, nn.Parameter(tensor.to(self.device), False))
        return CalibrationStream(self.model, self.architecture, segments, behind)

    @contextmanager
    def block(self, index: int, stream: CalibrationStream) -> Iterator[DecoderBlock]:
        """One block with its weights, for a while, and the text in front of it."""
        block = DecoderBlock(index, self._modules[index], self.architecture, self.model.config, stream)
        if self._weights is None:
            stored = read_block(block_file(self.directory, index))
            state = block_state(self.model, index, stored, self.dtype, self.device)
            for name, tensor in state.items():
                check_finite(tensor, f"{self.directory}: the tensor {name!r}")
            state = {name.removeprefix(f"{block.name}."): tensor for name, tensor in state.items()}
            block.module.load_state_dict(state, strict=True, assign=True)
        else:
            self._weights.load_into(block.module, block.name, self.device)
        stream.seed(block)
        try:
            yield block
        finally:
            block.module.to_empty(device="meta")

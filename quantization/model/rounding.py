"""What rounds beside the weights while a model runs, for methods that train with it at work (OmniQuant's W4A4)."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from intactkv.policy import KVPolicy
from quantization.model.activations import at_work
from quantization.model.attention import AttentionProducts
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import InputQuantizer

__all__ = ["BlockRounding"]


@dataclass(frozen=True)
class BlockRounding:
    """inputs: quantizers of the sets of linears that share an input. products: of attention's queries and rows. kv: of
    new keys and values; a cache has it (`CalibrationStream.new_cache`)."""

    inputs: Mapping[tuple[str, ...], InputQuantizer]
    products: AttentionProducts | None = None
    kv: KVPolicy | None = None

    @contextmanager
    def at_work(self, block: DecoderBlock) -> Iterator[None]:
        """Let inputs and products of a block be rounded, for a while."""
        with ExitStack() as stack:
            stack.enter_context(at_work(block, self.inputs))
            if self.products is not None:
                stack.enter_context(self.products.at_work(block))
            yield

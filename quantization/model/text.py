"""Where the calibration text lies between two blocks, and how many samples of it run through a block at once.

All samples have the same length, so the text is one tensor (N, T, hidden size). It stays on the GPU where it is small
beside it, else in pinned host memory, from which batches are copied while the GPU computes. How many samples a batch
has follows from the block's shapes and from the memory that the device has in all, never from what is free right now:
the order of sums depends on it, and a run that goes on must find the same bits.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor

from corpora.errors import UserError
from corpora.values import count as at_least
from corpora.values import from_environment

__all__ = [
    "BATCH",
    "Text",
    "TextWriter",
    "batch_of",
    "fits",
    "given_batch",
    "left_by_token",
    "memory_of",
    "said_when_full",
    "samples_at_once",
    "to_spare",
]

BATCH = "INTACTKV_CALIBRATION_BATCH"  # the environment variable: samples at once, in place of `samples_at_once`
# Tokens at once on a CPU: there the block's products are at their full speed, and what they read is still in its
# caches. One sample of 512 tokens takes 37 ms in a block of SmolLM2's shape, 8 at once take 40 ms each; of 64 tokens
# 5.4 and 4.4 ms (one thread of an Intel Xeon).
CPU_TOKENS = 512
SHARE_OF_TEXT = 1 / 8  # of a GPU's memory, up to which one copy of the text stays there
SHARE_OF_BATCH = 1 / 32  # of a GPU's memory, for what one batch leaves in a block
SHARE_TO_SPARE = {"cuda": 1 / 8, "cpu": 1 / 64}  # of the memory, for what only saves time


def memory_of(device: torch.device) -> int | None:
    """Bytes that a GPU has in all; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes are small beside a GPU's memory. Always on a CPU: there is no other place."""
    memory = memory_of(device)
    return memory is None or size <= SHARE_OF_TEXT * memory


def to_spare(size: int, device: torch.device) -> bool:
    """Whether so many bytes may be taken for what only saves time."""
    memory = memory_of(device) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return size <= SHARE_TO_SPARE[device.type] * memory


def given_batch() -> int:
    """Samples at once that the environment names, 0 if it names none. Raises UserError for what is no such number."""
    return from_environment(BATCH, at_least(1), 0)


def samples_at_once(widths: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many samples of so many tokens run through a block together, at least one.

    widths: (in, out) of a block's linears.
    """
    if given := given_batch():
        return given
    memory = memory_of(device)
    if memory is None:
        return max(1, CPU_TOKENS // tokens)
    return max(1, int(SHARE_OF_BATCH * memory) // (tokens * left_by_token(widths, dtype)))


def left_by_token(widths: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """Bytes that a token leaves in a block: what each linear reads and writes in the model's dtype, and a method turns
    the widest of these into float32, twice at most. widths: (in, out) of the linears."""
    return sum(map(sum, widths)) * dtype.itemsize + 8 * max(map(max, widths))


@contextmanager
def said_when_full(device: torch.device, batch: int | None = None) -> Iterator[None]:
    """Say what to do when a GPU's memory is used up. batch: calibration samples at once, if the method calibrates.

    Raises UserError in place of torch's error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        way_out, at_once = "give fewer or shorter samples (--calibration-samples, --calibration-length), or", ""
        if batch is not None:
            at_once = f" with {batch} calibration sample{'s' * (batch > 1)} at once"
            way_out = (f"set the environment variable {BATCH} below {batch}, " if batch > 1 else "") + way_out
        raise UserError(
            f"the {(memory_of(device) or 0) / 1e9:.0f} GB of {device} are used up{at_once} "
            f"({str(error).splitlines()[0][:150]}); {way_out} use a GPU with more memory"
        ) from None


class Text(Sequence[Tensor]):
    """Hidden states of all samples, (N, T, C), which nobody changes; each sample is (1, T, C), on the device that
    computes.

    values: all of them, on that device or in pinned host memory.
    """

    def __init__(self, values: Tensor, device: torch.device):
        self.values, self.device = values, device

    @classmethod
    def of(cls, batches: Iterable[Tensor], count: int, device: torch.device, into: "Text | None" = None) -> "Text":
        """Keep batches (B, T, C), of `count` samples in all, as they come. into: see `TextWriter`."""
        writer = TextWriter(count, device, into)
        for batch in batches:
            writer.add(batch)
        return writer.text

    def batch(self, start: int, stop: int) -> Tensor:
        """Samples from start to stop, (B, T, C), on the device."""
        return self.values[start:stop].to(self.device, non_blocking=True)

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "Text": ...
    def __getitem__(self, index: int | slice) -> "Tensor | Text":
        if isinstance(index, slice):
            return Text(self.values[index], self.device)
        place = range(len(self))[index]
        return self.batch(place, place + 1)


class TextWriter:
    """Keeps batches (B, T, C), of `count` samples in all, as they come.

    into: a text that is given up for it, if it has the shape; a batch may be made of the samples that it takes the
    place of.
    """

    def __init__(self, count: int, device: torch.device, into: Text | None = None):
        self._count, self._device, self._start = count, device, 0
        self._values = None if into is None else into.values

    def add(self, batch: Tensor) -> None:
        """The next samples."""
        shape, values = (self._count, *batch.shape[1:]), self._values
        if values is None or values.shape != shape or values.dtype != batch.dtype:
            assert self._start == 0, "batches of one text have one shape"
            stays = fits(batch[0].numel() * batch.element_size() * self._count, self._device)
            if stays:
                values = torch.empty(shape, dtype=batch.dtype, device=self._device)
            else:
                values = torch.empty(shape, dtype=batch.dtype, pin_memory=True)
            self._values = values
        values[self._start : self._start + len(batch)].copy_(batch, non_blocking=True)
        self._start += len(batch)

    @property
    def text(self) -> Text:
        """All samples."""
        assert self._values is not None, "a text has at least one sample"
        assert self._start == self._count, "samples are missing"
        return Text(self._values, self._device)


def batch_of(samples: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Samples from start to stop as one tensor, (B, T, C)."""
    return samples.batch(start, stop) if isinstance(samples, Text) else torch.cat([*samples[start:stop]])

"""Tensors that get a little longer again and again, without copying all of them every time."""

import torch
from torch import Tensor

__all__ = ["ROOM", "Rooms"]

ROOM = 256  # tokens, of which there is always a multiple: fewer are empty


class Rooms:
    """Room behind tensors, by their names. block: tokens that one entry of axis 2 stands for."""

    def __init__(self, block: int = 1) -> None:
        self._step = max(1, ROOM // block)
        self._rooms: dict[str, Tensor] = {}

    def joined(self, name: str, held: Tensor | None, new: Tensor) -> Tensor:
        """`held` with `new` behind it on axis 2. What comes one by one is written behind `held` in place: nothing but
        the last result may be in use."""
        if held is None:
            return new
        if not new.shape[2]:
            return held
        count = held.shape[2] + new.shape[2]
        if new.shape[2] > 1:
            return torch.cat([held, new], dim=2)
        room = self._rooms.get(name)
        if room is None or not _behind(held, room, count):
            room = self._rooms[name] = held.new_empty(
                *held.shape[:2], -(-count // self._step) * self._step, *held.shape[3:]
            )
            room[:, :, : held.shape[2]] = held
        room[:, :, held.shape[2] : count] = new
        return room[:, :, :count]


def _behind(held: Tensor, room: Tensor, count: int) -> bool:
    """Whether `held` is the beginning of the room, and the room may be written to and holds so many entries."""
    closed = room.is_inference() and not torch.is_inference_mode_enabled()
    begins = room.data_ptr() == held.data_ptr() and room.stride() == held.stride()
    return not closed and begins and room.shape[:2] == held.shape[:2] and room.shape[2] >= count

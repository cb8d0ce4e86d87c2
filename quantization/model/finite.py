"""Whether what the calibration text makes of a model is finite, without waiting for the device on every sample."""

import torch
from torch import Tensor

from corpora.errors import UserError

__all__ = ["FiniteCheck"]


class FiniteCheck:
    """Whether all that was shown is finite: looked at on the device as it comes, and asked for once, at the end."""

    def __init__(self) -> None:
        self._finite: dict[str, Tensor] = {}

    def add(self, what: str, x: Tensor) -> None:
        """what: ends the sentence "the calibration text gives …"."""
        now = torch.isfinite(torch.stack(torch.aminmax(x.detach()))).all()  # NaN is the lowest and the highest value
        self._finite[what] = self._finite[what] & now if what in self._finite else now

    def check(self) -> None:
        """Raise UserError for the first that was not."""
        if not self._finite:
            return
        for what, finite in zip(self._finite, torch.stack([*self._finite.values()]).tolist(), strict=True):
            if not finite:
                raise UserError(
                    f"the calibration text gives {what}; the checkpoint is damaged, or its dtype too narrow: convert "
                    "it to bfloat16 or float32"
                )

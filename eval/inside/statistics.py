"""What a tensor lost, and how its values are spread: the figures of every report.

    SQNR = 10·log₁₀(Σ x² / Σ (x − x̂)²) dB          MSE = mean (x − x̂)²
    kurtosis = mean((x − μ)⁴) / mean((x − μ)²)² − 3          population moments over the whole tensor

All sums are taken in float64: nothing overflows, and Σ (x − x̂)² is 0 only for equal tensors.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Loss", "TokenLoss", "kurtosis", "mse", "spread", "sqnr"]


@dataclass
class Loss:
    """Running sums of what was lost: `add` tensors of any shape, then read the figures.

    signal: Σ x². noise: Σ (x − x̂)². count: elements.
    """

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0

    def add(self, x: Tensor, changed: Tensor) -> None:
        """Count a tensor and its changed version, of the same shape. Raises ValueError if the shapes differ."""
        if x.shape != changed.shape:
            raise ValueError(f"a tensor of shape {tuple(x.shape)} has no error against {tuple(changed.shape)}")
        exact = x.double()
        self.signal += float(exact.square().sum())
        self.noise += float((exact - changed.to(x.device).double()).square().sum())
        self.count += x.numel()

    @property
    def sqnr(self) -> float:
        """The ratio in dB; +inf if nothing changed; −inf if something came of nothing; nan if nothing was counted."""
        if not self.count or math.isnan(self.noise):
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def mse(self) -> float:
        """The mean in the squared unit of the tensors; nan if nothing was counted."""
        return self.noise / self.count if self.count else math.nan


@dataclass
class TokenLoss(Loss):
    """The same for tensors of tokens, (T, channels). The sums belong to the few tokens with the longest vectors; the
    median over tokens of their own SQNR shows what happens to an ordinary one. tokens: (T,) dB of each `add`."""

    tokens: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, changed: Tensor) -> None:
        """Count the tokens of a tensor and its changed version."""
        super().add(x, changed)
        exact = x.double()
        noise = (exact - changed.to(x.device).double()).square().sum(-1)
        own = 10 * (exact.square().sum(-1) / noise).log10()
        self.tokens.append(own.masked_fill(noise == 0, math.inf).float().cpu())

    @property
    def median(self) -> float:
        """Median over tokens of a token's SQNR in dB; nan if nothing was counted."""
        return float(torch.cat(self.tokens).median()) if self.count else math.nan


def sqnr(x: Tensor, changed: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, +inf only if the tensors are equal."""
    loss = Loss()
    loss.add(x, changed)
    return loss.sqnr


def mse(x: Tensor, changed: Tensor) -> float:
    """Mean squared difference."""
    loss = Loss()
    loss.add(x, changed)
    return loss.mse


def kurtosis(x: Tensor) -> float:
    """Excess kurtosis of all values: 0 for a normal, −1.2 for a uniform distribution; nan if all values are equal."""
    centred = x.double() - x.double().mean()
    squares = centred.square()
    return float(squares.square().mean() / squares.mean().square()) - 3


def spread(x: Tensor) -> dict[str, float]:
    """mean, std (of the population), kurt, max, min of all values, in the tensor's unit."""
    exact = x.double()
    low, high = torch.aminmax(exact)
    return {
        "mean": float(exact.mean()),
        "std": float(exact.std(correction=0)),
        "kurt": kurtosis(x),
        "max": float(high),
        "min": float(low),
    }

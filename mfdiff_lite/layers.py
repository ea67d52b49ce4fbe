"""The two building blocks that the fusion module and the denoiser share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import GROUPS


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with group normalisation, modulated by a condition (FiLM, Perez et al. 2018): (B, C, H, W)
    -> (B, D, H, W)."""

    def __init__(self, channels: int, out_channels: int, condition: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels), nn.GroupNorm(GROUPS, out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(condition, 2 * out_channels)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)  # (B, D, 1, 1) each
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Embedding(nn.Module):
    """Scalars, each of order 1 and shaped (B,), -> (B, size) through sines and cosines and a small network."""

    def __init__(self, scalars: int, size: int, frequencies: int = 16):
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(200), frequencies)), persistent=False)
        self.net = nn.Sequential(
            nn.Linear(2 * frequencies * scalars, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU()
        )

    def forward(self, *scalars: Tensor) -> Tensor:
        phases = torch.cat([s[:, None] * self.frequencies for s in scalars], dim=1)
        return self.net(torch.cat([phases.sin(), phases.cos()], dim=1))


def dose_scalar(dose_reduction: Tensor) -> Tensor:
    """Dose-reduction factor (B,) -> log scale, about -1 .. 1 for 4 .. 100."""
    return torch.log(dose_reduction / 20) / math.log(5)

"""The conditional denoiser: a small U-Net that sees the noisy residual, the LPET, the fusion feature, the time and the
dose.

No raw MR enters here: whatever MR contributes has passed the gate of the fusion module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fusion import Decoder, Encoder, zero_head
from .layers import Embedding, ResidualBlock, dose_scalar


class ConditionalUNet(nn.Module):
    """D(x_t, t, LPET, F, dose) -> v. x_t, lpet: (B, 1, H, W); time: (B,) in [0, 1]; feature: (B, C, H/2, W/2);
    dose_reduction: (B,)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), feature: int = 32):
        super().__init__()
        condition = 4 * widths[0]
        self.embed = Embedding(2, condition)
        self.encoder = Encoder(4 + 4 + feature, widths, condition)
        self.middle = ResidualBlock(widths[-1], widths[-1], condition)
        self.decoder = Decoder(widths, condition)
        self.head = zero_head(widths[0])

    def forward(self, xt: Tensor, time: Tensor, lpet: Tensor, feature: Tensor, dose_reduction: Tensor) -> Tensor:
        images = torch.cat([F.pixel_unshuffle(xt, 2), F.pixel_unshuffle(lpet, 2), feature], dim=1)
        return self._velocity(self.encoder.enter(images), time, dose_reduction)

    def given(self, lpet: Tensor, feature: Tensor, dose_reduction: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`forward` as (x_t, time) -> v under these conditions, for many times and many x_t, (B K, 1, H, W), K for each
        slice: a convolution is linear, so the first one meets LPET and feature once and only x_t in every step."""
        enter = self.encoder.enter
        conditions = torch.cat([F.pixel_unshuffle(lpet, 2), feature], dim=1)
        known = F.conv2d(conditions, enter.weight[:, 4:], enter.bias, padding=1)

        def denoise(xt: Tensor, time: Tensor) -> Tensor:
            k = len(xt) // len(known)
            entered = F.conv2d(F.pixel_unshuffle(xt, 2), enter.weight[:, :4], padding=1)
            entered = entered + known.repeat_interleave(k, 0)  # (B K, C, H/2, W/2)
            return self._velocity(entered, time, dose_reduction.repeat_interleave(k))

        return denoise

    def _velocity(self, entered: Tensor, time: Tensor, dose_reduction: Tensor) -> Tensor:
        condition = self.embed(time, dose_scalar(dose_reduction))
        features = self.encoder.levels(entered, condition)
        features[-1] = self.middle(features[-1], condition)
        return F.pixel_shuffle(self.head(F.silu(self.decoder(features, condition))), 2)

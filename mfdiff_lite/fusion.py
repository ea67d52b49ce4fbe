"""The multi-modality fusion module: take from MR what helps, let no foreign detail in.

    p_s, m_s = encoders(LPET), encoders(MR)                      scales s = 1/2, 1/4, 1/8 of the image
    S_s      = local correlation of IN(p_s) and IN(m_s)          structure agreement, blind to contrast
    r_s      = cross-attention(query p_s; key, value m_s)        MR features, fetched by PET from near by
    g_s      = sigmoid(conv[p_s, r_s, S_s])                      gate in [0, 1]
    f_s      = p_s + fit * g_s * r_s                             PET is the base, MR only adds
    F        = decoder(f_1/2, f_1/4, f_1/8)                      the fusion feature
    coarse   = smooth(LPET) + head(F)                            auxiliary head: what makes F "optimized"

fit, one number a slice, weighs the whole MR branch: does this MR show the head that the PET shows?

Nothing on the way from m_s to r_s has a bias, and an empty MR has m_s = 0: then S_s = r_s = 0 and f_s = p_s, so
restoring without MR is exactly restoring from PET alone.

That a fusion feature is learned and conditions the diffusion is the paper's (abstract); this layout is our
interpretation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .config import SCALES, SIDE
from .layers import Embedding, ResidualBlock, dose_scalar

WINDOW = SIDE // 2**SCALES  # side of a block of queries in feature pixels, at every scale
HALO = 2  # feature pixels of MR that a block sees beyond each of its sides
REACH = WINDOW + 2 * HALO
SPREADS = (0.5, 1.0, 2.0, 4.0)  # SD of the attention of each head to begin with, feature pixels
HEADS = len(SPREADS)
TEXTURES = 4  # numbers that describe the noise, see `texture`


class Fused(NamedTuple):
    """feature: (B, C, H/2, W/2); coarse: (B, 1, H, W) scaled activity; gate: (B, 1, H/2, W/2) what share of the MR gets
    in, mean over channels, 0 without MR; similarity: (B, 1, H/2, W/2) in [-1, 1]; fit: (B,) in [0, 1], whether the MR
    shows the head that the PET shows, 0 without MR."""

    feature: Tensor
    coarse: Tensor
    gate: Tensor
    similarity: Tensor
    fit: Tensor


class MultiModalityFusion(nn.Module):
    """LPET and MR slices (B, context, H, W), dose reduction (B,) -> `Fused`. H and W are multiples of 32; the middle
    slice is restored."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), context: int = 3):
        super().__init__()
        condition = 2 * widths[0]
        self.context = context
        self.embed, self.texture = Embedding(1, condition), NoiseEmbedding(condition)
        self.pet_encoder = Encoder(4 * context, widths, condition)
        self.mr_encoder = Encoder(4 * context, widths, condition)
        self.fits = Fit(widths)
        self.fuse = nn.ModuleList(GatedFusion(width) for width in widths)
        self.decoder = Decoder(widths, condition)
        self.head = zero_head(widths[0])

    def forward(self, lpet: Tensor, mr: Tensor, dose_reduction: Tensor) -> Fused:
        condition = self.embed(dose_scalar(dose_reduction)) + self.texture(lpet)
        pet_features = self.pet_encoder(F.pixel_unshuffle(lpet, 2), condition)
        seen = (mr != 0).flatten(1).any(1)[:, None, None, None]  # (B, 1, 1, 1), no for an empty MR
        mr_features = [m * seen for m in self.mr_encoder(F.pixel_unshuffle(mr, 2), condition)]
        fit = seen * self.fits(pet_features, mr_features)
        fused, gates, similarities = zip(
            *(f(p, m) for f, p, m in zip(self.fuse, pet_features, mr_features, strict=True)), strict=True
        )
        feature = self.decoder([p + fit * (f - p) for p, f in zip(pet_features, fused, strict=True)], condition)
        coarse = smooth(lpet) + F.pixel_shuffle(self.head(F.silu(feature)), 2)
        gate, similarity = (maps[0].mean(1, keepdim=True) for maps in (gates, similarities))
        return Fused(feature, coarse, fit * gate, similarity, fit.flatten())


class PlainFusion(nn.Module):
    """The baseline in its place: one encoder for all slices, with MR ("concat") or without ("pet"); nothing decides
    what the MR may do. Same input and output, gate and similarity 0."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), context: int = 3, with_mr: bool = True):
        super().__init__()
        condition = 2 * widths[0]
        self.context, self.with_mr = context, with_mr
        self.embed, self.texture = Embedding(1, condition), NoiseEmbedding(condition)
        self.encoder = Encoder(4 * context * (1 + with_mr), widths, condition)
        self.middle = ResidualBlock(widths[-1], widths[-1], condition)
        self.decoder = Decoder(widths, condition)
        self.head = zero_head(widths[0])

    def forward(self, lpet: Tensor, mr: Tensor, dose_reduction: Tensor) -> Fused:
        condition = self.embed(dose_scalar(dose_reduction)) + self.texture(lpet)
        images = torch.cat([lpet, mr], dim=1) if self.with_mr else lpet
        features = self.encoder(F.pixel_unshuffle(images, 2), condition)
        features[-1] = self.middle(features[-1], condition)
        feature = self.decoder(features, condition)
        nothing = torch.zeros_like(feature[:, :1])
        coarse = smooth(lpet) + F.pixel_shuffle(self.head(F.silu(feature)), 2)
        return Fused(feature, coarse, nothing, nothing, nothing[:, 0, 0, 0])


class Fit(nn.Module):
    """Does the MR show the head that the PET shows? Features of both at all scales -> (B, 1, 1, 1) in [0, 1].

    It sees how every feature of PET goes with its partner of MR over the slice, their correlation coefficient."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(sum(widths), 32), nn.SiLU(), nn.Linear(32, 1))
        nn.init.constant_(self.net[-1].get_parameter("bias"), 2.0)  # believes the MR to begin with

    def forward(self, pet: list[Tensor], mr: list[Tensor]) -> Tensor:
        pairs = [F.instance_norm(p) * F.instance_norm(m) for p, m in zip(pet, mr, strict=True)]
        return torch.sigmoid(self.net(torch.cat([pair.mean((2, 3)) for pair in pairs], dim=1)))[..., None, None]


class NoiseEmbedding(nn.Module):
    """What noise the network faces, seen from the LPET alone: slices (B, context, H, W) -> (B, size), added to the
    embedding of the dose reduction, which says little across scanners. Starts at 0."""

    def __init__(self, size: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(TEXTURES, size), nn.SiLU(), nn.Linear(size, size))
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, lpet: Tensor) -> Tensor:
        return self.net(texture(lpet))


class GatedFusion(nn.Module):
    """One scale: similarity, PET-query cross-attention, gate. p, m: (B, C, H, W) -> fused (B, C, H, W), gate,
    similarity (B, HEADS, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key_value = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.position = nn.Parameter(nearness())
        self.refine = nn.Conv2d(channels, channels, 1, bias=False)
        self.gate = nn.Conv2d(2 * channels + HEADS, channels, 3, padding=1)
        for weight in (self.key_value.weight[channels:], self.refine.weight):
            nn.init.kaiming_uniform_(weight, nonlinearity="linear")  # as strong as m, or it is not learned from
        nn.init.zeros_(self.gate.get_parameter("bias"))  # start half open

    def forward(self, p: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pn, mn = F.instance_norm(p), F.instance_norm(m)
        similarity = local_correlation(pn, mn)
        r = self.refine(self.attend(pn, mn))
        gate = torch.sigmoid(self.gate(torch.cat([pn, r, similarity], dim=1)))
        return p + gate * r, gate, similarity

    def attend(self, pn: Tensor, mn: Tensor) -> Tensor:
        """Each PET pixel looks at the MR pixels of its block and a halo round it: at least HALO pixels to every side,
        which also bridges a misregistration."""
        q, k, v = self._windows(pn, mn)
        if torch.is_grad_enabled():  # PyTorch's fused kernel takes no mask that has a gradient
            found = self._weights(q, k) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=self.position.detach()[None].to(q.dtype))
        rows = pn.shape[-2] // WINDOW
        return rearrange(found, "(b h w) n (i j) c -> b (n c) (h i) (w j)", b=pn.shape[0], h=rows, i=WINDOW)

    def attention(self, pn: Tensor, mn: Tensor) -> Tensor:
        """Where each PET pixel looks, for pictures: weights (B, HEADS, H, W, REACH, REACH) over the MR pixels of its
        block and halo, softmax(q k / sqrt(c) + position), which sum to 1. What lies beyond the image is worth 0."""
        q, k, _ = self._windows(pn, mn)
        weights = self._weights(q, k)
        rows, split = pn.shape[-2] // WINDOW, {"i": WINDOW, "k": REACH}
        return rearrange(weights, "(b h w) n (i j) (k l) -> b n (h i) (w j) k l", b=pn.shape[0], h=rows, **split)

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        logits = (q / q.shape[-1] ** 0.5) @ k.mT
        return torch.softmax(logits + self.position.to(logits.dtype), dim=-1)

    def _windows(self, pn: Tensor, mn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of PET (blocks, HEADS, WINDOW^2, C / HEADS); keys and values of MR (blocks, HEADS, REACH^2,
        C / HEADS)."""
        to_blocks = "b (n c) (h i) (w j) -> (b h w) n (i j) c"
        q = rearrange(self.query(pn), to_blocks, n=HEADS, i=WINDOW, j=WINDOW)
        near = F.unfold(self.key_value(mn), REACH, padding=HALO, stride=WINDOW)
        k, v = rearrange(near, "b (s n c k) blocks -> s (b blocks) n k c", s=2, n=HEADS, k=REACH**2)
        return q, k, v


def nearness() -> Tensor:
    """What the attention adds to its logits before anything is learned: -|x - y|^2 / (2 SD^2) from query pixel x to MR
    pixel y, so that it starts as a Gaussian round the query's own place, another SD (`SPREADS`) for each head. Without,
    it would start as the mean of all that the block sees, which blurs the MR.

    Returns (HEADS, WINDOW^2, REACH^2).
    """
    x = torch.cartesian_prod(*2 * (HALO + torch.arange(WINDOW),))
    y = torch.cartesian_prod(*2 * (torch.arange(REACH),))
    return -(torch.cdist(x.float(), y.float()) ** 2) / (2 * torch.tensor(SPREADS)[:, None, None] ** 2)


class Encoder(nn.Module):
    """(B, channels, H, W) -> one feature map a scale, finest first."""

    def __init__(self, channels: int, widths: tuple[int, ...], condition: int):
        super().__init__()
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.blocks = nn.ModuleList(ResidualBlock(w, w, condition) for w in widths)

    def forward(self, x: Tensor, condition: Tensor) -> list[Tensor]:
        return self.levels(self.enter(x), condition)

    def levels(self, entered: Tensor, condition: Tensor) -> list[Tensor]:
        """What follows the first convolution."""
        features = [self.blocks[0](entered, condition)]
        for down, block in zip(self.down, self.blocks[1:], strict=True):
            features.append(block(down(features[-1]), condition))
        return features


class Decoder(nn.Module):
    """Feature maps, finest first -> one map at the finest scale."""

    def __init__(self, widths: tuple[int, ...], condition: int):
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))[::-1]
        self.blocks = nn.ModuleList(ResidualBlock(fine + coarse, fine, condition) for fine, coarse in pairs)

    def forward(self, features: list[Tensor] | tuple[Tensor, ...], condition: Tensor) -> Tensor:
        x = features[-1]
        for skip, block in zip(features[-2::-1], self.blocks, strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([skip, x], dim=1), condition)
        return x


def zero_head(channels: int) -> nn.Conv2d:
    """Features -> the four pixels that `pixel_shuffle` interleaves; starts at zero: training starts at the Gaussian."""
    head = nn.Conv2d(channels, 4, 3, padding=1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def smooth(slices: Tensor) -> Tensor:
    """The middle slice after a fixed 3-D Gaussian over the slices at hand (SD 1.5 pixels, 0.8 slices): (B, context, H,
    W) -> (B, 1, H, W). In the precision of the slices, also under autocast: it is most of the result."""
    with torch.autocast(slices.device.type, enabled=False):
        return _smooth(slices)


def _smooth(slices: Tensor) -> Tensor:
    axial = torch.arange(slices.shape[1], device=slices.device) - slices.shape[1] // 2
    weights = torch.softmax(-0.5 * (axial / 0.8) ** 2, 0).to(slices.dtype)
    middle = torch.einsum("bnhw,n->bhw", slices, weights)[:, None]
    taps = torch.softmax(-0.5 * (torch.arange(-4, 5, device=slices.device) / 1.5) ** 2, 0).to(slices.dtype)
    middle = F.conv2d(F.pad(middle, (0, 0, 4, 4), mode="replicate"), taps[None, None, :, None])
    return F.conv2d(F.pad(middle, (4, 4, 0, 0), mode="replicate"), taps[None, None, None, :])


def texture(lpet: Tensor) -> Tensor:
    """Level and correlation of the noise in scaled slices: (B, context, H, W) -> (B, TEXTURES), each of order 1.

    The power inside the head of three bands, finer than 3, 7 and 15 pixels (anatomy adds to the last), in its
    logarithm; and the correlation of the finest between neighbouring slices: 0 where slices are independent, 1 where a
    single one is repeated.
    """
    scales = [local_mean(lpet, n // 2) for n in (3, 7, 15)]
    head = (scales[1] > 0.4).to(lpet.dtype)
    bands = [a - b for a, b in zip([lpet, *scales], scales)]  # noqa: B905 (one less)
    voxels = head.sum((1, 2, 3)).clamp(min=1)
    power = [(head * band**2).sum((1, 2, 3)) / voxels for band in bands]
    levels = [torch.log(p + 1e-4) / 4 + 1 for p in power]
    fine = head * bands[0]
    shared = (fine[:, 1:] * fine[:, :-1]).sum((1, 2, 3)) / max(lpet.shape[1] - 1, 1) * lpet.shape[1]
    return torch.stack([*levels, shared / (fine**2).sum((1, 2, 3)).clamp(min=1e-6)], dim=1)


def local_correlation(pn: Tensor, mn: Tensor, radius: int = 2) -> Tensor:
    """Cosine similarity of two normalised feature maps in a small neighbourhood: (B, C, H, W) x 2 -> (B, HEADS, H, W)
    in [-1, 1]."""

    def pooled(product: Tensor) -> Tensor:
        return local_mean(rearrange(product, "b (n c) h w -> b n c h w", n=HEADS).sum(2), radius)

    return pooled(pn * mn) / (pooled(pn * pn) * pooled(mn * mn) + 1e-6).sqrt()


def local_mean(image: Tensor, radius: int) -> Tensor:
    """Mean over the square of 2 radius + 1 pixels round each, as far as it lies in the image: a mean of means, which
    reads 2 (2r + 1) values a pixel instead of (2r + 1)^2."""
    for x, y in ((radius, 0), (0, radius)):
        image = F.avg_pool2d(image, (2 * x + 1, 2 * y + 1), 1, (x, y), count_include_pad=False)
    return image


FUSIONS: dict[str, Callable[..., MultiModalityFusion | PlainFusion]] = {
    "gated": MultiModalityFusion,
    "concat": PlainFusion,
    "pet": partial(PlainFusion, with_mr=False),
}

"""Stage 2, self-supervised learning of specific priors on a target that has no standard-dose image.

    objective  needs            loss of f, the coarse estimate (LPET, MR) -> PET
    "split"    count halves     |f(y + m n) - (y - n / m)|^2, n and -n             Pang et al. 2021
    "sure"     the LPET         |f(y) - y|^2 + 2 n' (f(y + e n) - f(y)) / e        SURE, Ramani et al. 2008
    "paired"   the SPET         the loss of stage 1                                the oracle, for comparison

y is the LPET, the mean of a and b, images of two halves of its counts; n = (a - b) / 2 is noise like the LPET's own.
With m = 1 "split" is Noise2Noise (Lehtinen et al. 2018): f(a) against b, whose noise is independent, so that b teaches
what the SPET would. But f(a) is a restoration of half the dose. A smaller m mixes the halves: the input comes near the
LPET (f is told its dose), the target gets noisier, and the two stay uncorrelated. Without halves "sure" borrows n from
the differences between slices (`noise_like`). That stage 2 is self-supervised on the target's own LPET and MR is our
interpretation of the paper.

Trained are `specific_parameters` alone, on batches of which a share is stage 1's simulated data, against forgetting.
Every fifth slice of the target is held out; the weights with the lowest loss *there* are kept, the parent's included,
so no ground truth decides when to stop.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from .cohort import SliceDataset, make_cohort
from .config import Adaptation, load_profile
from .model import MFdiff, pick_device, residual_sd, save_model
from .scan import ActivityScale, Scan, WorkingGrid, scale_mr
from .training import (
    code_revision,
    interrupt_after_step,
    load_checkpoint,
    refuse_or_resume,
    save_checkpoint,
    update_average,
)

WEIGHTS = "stage2.safetensors"
MIX = 0.5  # share of the halves' difference in the input of "split": 1 takes the halves themselves
PROBE = 0.05  # step e of the divergence, in SDs of the noise
BORROWED = 4  # slices between a slice and the one whose noise `noise_like` lends it
FROM_SLICES = "noise independent from slice to slice, anatomy alike in neighbouring slices"


@dataclasses.dataclass(frozen=True)
class AdaptationState:
    """What a step of stage 2 shows. loss: running mean on the target; held_out: [{"step", "loss"}] so far, the first
    one the parent's; best: step of the lowest, 0 for the parent; model: the weights of that step, to keep; now: the
    averaged weights of this step."""

    step: int
    steps: int
    loss: float | None
    held_out: list[dict[str, float]]
    best: int
    seconds: float
    model: MFdiff
    now: MFdiff


def train_stage2(
    model: MFdiff,
    target: Scan | Sequence[Scan],
    objective: str = "split",
    *,
    settings: Adaptation | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
) -> Iterator[AdaptationState]:
    """Adapt a model to a target: one scan, or several of one scanner. Yields an `AdaptationState` after each step, and
    ends when the held-out loss has not fallen for `patience` validations; the last state's model is the adapted one.

    objective: "split", "sure" or "paired". out: folder for the checkpoint and the final weights; None keeps nothing.
    resume: go on from the checkpoint in `out` if there is one. The given model is not changed. Raises ValueError if a
    scan lacks what the objective needs, FileExistsError if `out` holds a run and `resume` is off.
    """
    settings = dataclasses.replace(settings or Adaptation(), objective=objective)
    scans = [target] if isinstance(target, Scan) else list(target)
    data = TargetSlices(scans, settings, model.fusion.context)
    out = None if out is None else Path(out)
    held = refuse_or_resume(out, resume)
    student = copy.deepcopy(model).to(pick_device(device))
    simulated = None if settings.rehearsal == 0 else _simulated(settings, model.fusion.context, workers)
    average, best = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    trained = specific_parameters(student) if settings.trained == "specific" else list(student.parameters())
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0)
    step, seconds, running, curve = 0, 0.0, None, [{"step": 0, "loss": data.held_out_loss(student)}]
    models = {"model": student, "average": average, "best": best}
    made_with = dataclasses.asdict(settings) | {
        "parent": model.fingerprint,
        "target": [f"{scan.name}, total {scan.lpet.sum():.6g}" for scan in scans],
    }
    if held:
        step, seconds, curve = load_checkpoint(out, made_with, models, optimizer).values()
    card = _card(model, settings, scans, data.assumed)

    def ended() -> bool:
        return step >= settings.steps or curve[-1]["step"] - _best(curve) >= settings.patience * settings.validate_every

    def state() -> AdaptationState:
        so_far = {"steps": _best(curve), "training_minutes": round(seconds / 60, 1), "held_out_loss": list(curve)}
        best.card = card | so_far
        return AdaptationState(step, settings.steps, running, list(curve), _best(curve), seconds, best, average)

    if ended():  # a run that had only its last file left to write
        yield state()
    with interrupt_after_step() as interrupted:
        while not ended():
            began = time.monotonic()
            loss = data.loss(student, data.batch(step), [step, 0])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if simulated is not None:
                size = max(1, round(settings.rehearsal * settings.batch))
                _supervised(student, simulated.batch(step, size), [settings.seed, step, 1]).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
            update_average(average, student, min(settings.ema, step / (step + 10)))
            running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
            if step % settings.validate_every == 0 or step == settings.steps:
                curve.append({"step": step, "loss": data.held_out_loss(average)})
                if _best(curve) == step:
                    best.load_state_dict(average.state_dict())
            seconds += time.monotonic() - began
            if out is not None and (step % settings.validate_every == 0 or ended() or interrupted.is_set()):
                out.mkdir(parents=True, exist_ok=True)
                progress = {"step": step, "seconds": seconds, "curve": curve}
                save_checkpoint(out, made_with, models, optimizer, progress)
            if interrupted.is_set():
                raise KeyboardInterrupt
            yield state()
    if out is not None:
        save_model(best, out / WEIGHTS, best.card)


def adapt(model: MFdiff, target: Scan | Sequence[Scan], objective: str = "split", **options: Any) -> MFdiff:
    """`train_stage2` to its end; returns the adapted model."""
    return [state.model for state in train_stage2(model, target, objective, **options)][-1]


def specific_parameters(model: MFdiff) -> list[nn.Parameter]:
    """What stage 2 trains, about a tenth of the weights: norms and FiLM everywhere, and in the fusion module the
    embedding of the dose, attention and head. All else of `model` is frozen."""
    model.requires_grad_(False)
    small = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    small += [m for name, m in model.named_modules() if name.endswith(".film")]
    small += [m for name, m in model.fusion.named_modules() if name.endswith(("query", "key_value", "refine"))]
    small += [model.fusion.embed, model.fusion.head]
    for module in small:
        module.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


class TargetSlices:
    """The target's slices as the model sees them (`WorkingGrid`, `ActivityScale`), and the loss on them.

    Each scan becomes tensors (Z, X, Y): "lpet", "mr", "weight", and by objective "noise" or "spet".
    assumed: what was assumed about the noise, None if it was measured.
    """

    def __init__(self, scans: Sequence[Scan], settings: Adaptation, context: int):
        self.settings, self.context, self.assumed = settings, context, None
        self.scans = [self._prepared(scan) for scan in scans]
        if not self.scans:
            raise ValueError("stage 2: expected at least one scan to adapt to, found none")

    def _prepared(self, scan: Scan) -> dict[str, Any]:
        objective = self.settings.objective
        _require(scan, objective)
        grid = WorkingGrid(scan)
        raw = grid.to(scan.lpet)
        scale = ActivityScale(raw, grid.voxel_size)
        images = {"lpet": scale.apply(raw), "weight": np.where(scale.mask, 1.0, 0.2)}
        images["mr"] = np.zeros_like(raw) if scan.mr is None else scale_mr(grid.to(scan.mr), scale.mask)
        halves = None if scan.halves is None else [scale.apply(grid.to(half)) for half in scan.halves]
        if objective in ("split", "sure"):
            images["noise"] = (halves[0] - halves[1]) / 2 if halves else noise_like(images["lpet"])
            self.assumed = None if halves else FROM_SLICES
        else:
            images["spet"] = scale.apply(grid.to(scan.spet))
        x, y, z = raw.shape
        pad = ((0, 0), (0, -x % 32), (0, -y % 32))
        tensors = {
            name: torch.from_numpy(np.pad(np.moveaxis(image, -1, 0), pad).astype(np.float32))
            for name, image in images.items()
        }
        if z < 5:
            raise ValueError(f"{scan.name}: expected at least 5 slices to adapt to, one of them held out, found {z}")
        held = np.arange(z) % 5 == 2
        return tensors | {"dose": scan.dose_reduction, "held": np.flatnonzero(held), "learned": np.flatnonzero(~held)}

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch number `step`, always the same: random learned slices of one scan, half of the batches mirrored, the
        noise of half of the slices negated: either half of the counts may teach the other. The noise of "sure" is moved
        a little each time: one and the same probe could be fitted."""
        rng = np.random.default_rng([self.settings.seed, step, 41])
        scan = self.scans[rng.integers(len(self.scans))]
        batch = self._slices(scan, rng.choice(scan["learned"], self.settings.batch))
        if self.settings.objective == "sure":
            batch["noise"] = batch["noise"].roll(rng.integers(-3, 4, 2).tolist(), (-2, -1))
        if "noise" in batch:
            sign = np.float32(rng.choice((-1, 1), self.settings.batch))
            batch["noise"] = batch["noise"] * torch.from_numpy(sign)[:, None, None, None]
        if rng.random() < 0.5:
            batch = {key: value.flip(-2) if value.ndim == 4 else value for key, value in batch.items()}
        return batch

    def _slices(self, scan: dict[str, Any], chosen: np.ndarray) -> dict[str, Tensor]:
        """All images of the chosen slices with their neighbours, (B, context, X, Y), and the dose (B,)."""
        half, last = self.context // 2, scan["lpet"].shape[0] - 1
        near = np.clip(chosen[:, None] + np.arange(-half, half + 1), 0, last)
        batch = {name: image[near] for name, image in scan.items() if isinstance(image, Tensor)}
        return batch | {"dose": torch.full((len(chosen),), float(scan["dose"]))}

    def loss(self, model: MFdiff, batch: dict[str, Tensor], seed: list[int]) -> Tensor:
        """The objective on one batch, a mean over voxels in units of the expected residual. seed: of what "paired"
        draws."""
        batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
        middle = {key: x[:, self.context // 2, None] for key, x in batch.items() if key != "dose"}  # (B, 1, X, Y)
        dose, mr = batch["dose"], batch["mr"]
        weight = middle["weight"] / middle["weight"].mean() / residual_sd(dose) ** 2

        def f(pet: Tensor, dose: Tensor) -> Tensor:
            return model.fusion(pet, mr, dose).coarse

        if self.settings.objective == "split":  # y + MIX n has the variance of y times 1 + MIX^2
            restored = f(batch["lpet"] + MIX * batch["noise"], (1 + MIX**2) * dose)
            return (weight * (restored - (middle["lpet"] - middle["noise"] / MIX)) ** 2).mean()
        if self.settings.objective == "sure":
            plain, probed = f(batch["lpet"], dose), f(batch["lpet"] + PROBE * batch["noise"], dose)
            divergence = middle["noise"] * (probed - plain) / PROBE
            return (weight * ((plain - middle["lpet"]) ** 2 + 2 * divergence)).mean()
        return _supervised(model, batch | {key: middle[key] for key in ("spet", "weight")}, [self.settings.seed, *seed])

    @torch.no_grad()
    def held_out_loss(self, model: MFdiff) -> float:
        """Mean loss over the held-out slices of all scans, and both signs of the noise; each call sees the same."""
        losses = []
        for scan in self.scans:
            for first in range(0, len(scan["held"]), self.settings.batch):
                some = scan["held"][first : first + self.settings.batch]
                batch = self._slices(scan, some)
                both = [batch, batch | {"noise": -batch["noise"]}] if "noise" in batch else [batch]
                losses += [self.loss(model, one, [first, 2]).item() for one in both for _ in some]
        return float(np.mean(losses))


def noise_like(lpet: np.ndarray) -> np.ndarray:
    """A noise image with about the covariance of the noise in an LPET (X, Y, Z), for want of count halves.

    The difference between a slice and the mean of its neighbours, scaled to the noise of one slice, and lent to the
    slice `BORROWED` further on, whose own noise it does not know. Assumes `FROM_SLICES`.
    """
    difference = (lpet - (np.roll(lpet, 1, -1) + np.roll(lpet, -1, -1)) / 2) / np.sqrt(1.5)
    difference[..., [0, -1]] = difference[..., [1, -2]]
    local = np.sqrt(ndimage.gaussian_filter(lpet, (3, 3, 1)).clip(min=1e-3))  # counting noise grows as sqrt(activity)
    order = np.arange(lpet.shape[-1])
    lent = np.where(order + BORROWED < len(order), order + BORROWED, order - BORROWED)
    return (difference / local)[..., lent] * local


def _require(scan: Scan, objective: str) -> None:
    """Refuse a scan that lacks what the objective needs."""
    if objective == "split" and scan.halves is None:
        raise ValueError(
            f"{scan.name}: expected count halves for the objective 'split', found none; reconstruct two halves of the "
            "list-mode counts (Scanner.scan(..., halves=True) in simulation), or use the objective 'sure'"
        )
    if objective == "sure" and scan.halves is None and scan.lpet.shape[2] < 2 * BORROWED:
        raise ValueError(
            f"{scan.name}: expected count halves or at least {2 * BORROWED} slices for the objective 'sure', found "
            f"{scan.lpet.shape[2]} slices and no halves; its noise cannot be estimated"
        )
    if objective == "paired" and scan.spet is None:
        raise ValueError(
            f"{scan.name}: expected the SPET for the objective 'paired', found none; use 'split' or 'sure'"
        )


def _simulated(settings: Adaptation, context: int, workers: int | None) -> SliceDataset:
    """Stage 1's simulated patients, of which a few are rehearsed."""
    profile = load_profile("cpu", patients=settings.rehearsal_patients, context=context)
    cohort = make_cohort(profile, "train", workers)
    return SliceDataset(cohort, dataclasses.replace(profile, seed=settings.seed))


def _supervised(model: MFdiff, batch: dict[str, Tensor], seed: list[int]) -> Tensor:
    """The loss of stage 1 on a batch, its times and noise drawn from `seed`."""
    device, rng = next(model.parameters()).device, np.random.default_rng(seed)
    batch = {key: x.to(device) for key, x in batch.items()}
    t = torch.from_numpy(rng.integers(0, model.schedule.length, len(batch["dose"])))
    noise = torch.from_numpy(rng.standard_normal(tuple(batch["spet"].shape), dtype=np.float32))
    return sum(model(batch, t.to(device), noise.to(device)).values())


def _best(curve: list[dict[str, float]]) -> int:
    """The step with the lowest held-out loss; 0 is the parent."""
    return int(min(curve, key=lambda one: one["loss"])["step"])


def _card(parent: MFdiff, settings: Adaptation, scans: list[Scan], assumed: str | None) -> dict[str, Any]:
    return {
        "what": "MFdiff stage 2, moving average of the weights at the lowest held-out loss",
        "parent": {"fingerprint": parent.fingerprint, "revision": parent.card.get("revision")},
        "adaptation": dataclasses.asdict(settings),
        "target": [scan.name for scan in scans],
        "assumed_about_noise": assumed,
        "revision": code_revision(),
        "torch": torch.__version__,
        "licence": "MIT",
        "use": "teaching and research; not a medical device",
    }

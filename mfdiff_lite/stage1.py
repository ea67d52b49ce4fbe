"""Stage 1, supervised learning of generalized priors on the simulated cohort.

    loss = |coarse - SPET|^2 / s^2 + |D(x_t, t, LPET, F, dose) - v|^2        `MFdiff.forward`

on batches of slices whose times t are stratified over the schedule, with warm-up and a half cosine of the learning
rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cohort import SliceDataset, make_cohort
from .config import TRAIN_ANATOMIES, VALIDATION_ANATOMIES, Profile
from .diffusion import NoiseSchedule
from .loop import Plan, TrainingState, accelerator_on, refuse_to_mix, training_loop
from .metrics import psnr
from .model import MFdiff, paired_noise

WEIGHTS = "stage1.safetensors"


def train_stage1(
    profile: Profile,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    start: MFdiff | None = None,
) -> Generator[TrainingState, None, None]:
    """Train MFdiff on the profile's cohort, yielding a `TrainingState` after each step (`loop.training_loop`).

    out: folder for checkpoints and the final weights; None keeps nothing. resume: go on from the checkpoint in `out` if
    there is one; the result equals that of an uncut run. workers: processes that simulate the cohort. start: a model of
    the same shape to start from instead of random weights. Raises ValueError if the checkpoint belongs to another
    profile or cohort or `start` has another shape, FileExistsError if `out` holds a run and `resume` is off,
    FloatingPointError if the loss is no longer finite.
    """
    folder = refuse_to_mix(out, resume)
    accelerator = accelerator_on(device, half=True)
    shares = accelerator.num_processes * profile.accumulate
    if profile.batch % shares:
        raise ValueError(
            f"batch: expected a multiple of processes x accumulate, found {profile.batch} for "
            f"{accelerator.num_processes} x {profile.accumulate}; choose another batch"
        )
    with accelerator.main_process_first():  # the others find it in the cache
        objective = Supervised(profile, workers)
    student = _student(profile, start)
    plan = Plan(
        trained=list(student.parameters()),
        steps=profile.steps,
        learning_rate=lambda step: learning_rate(profile, step),
        ema=profile.ema,
        check_every=profile.validate_every,
        save_every=profile.checkpoint_every,
        weights=WEIGHTS,
        curve="validation_psnr_db",
        made_with=dataclasses.asdict(profile)
        | {"cohort": objective.cohort, "started_from": None if start is None else start.fingerprint},
        card=_card(profile, objective.cohort, start),
        weight_decay=1e-4,
    )
    yield from training_loop(student, objective, plan, accelerator, folder, resume)


class Supervised:
    """The objective of stage 1: batches of the training cohort, PSNR on the validation one."""

    def __init__(self, profile: Profile, workers: int | None = None):
        self.profile, self.times = profile, NoiseSchedule().length
        cohort = make_cohort(profile, "train", workers)
        self.cohort = cohort.key
        self.data, self.validation = SliceDataset(cohort, profile), ValidationSet(profile, workers)

    def parts(self, step: int, process: int = 0, processes: int = 1) -> list[dict[str, Tensor]]:
        """Shares of the batch of a step, for this process: each slice with its time and noise."""
        batch = self.batch(step)
        shares = processes * self.profile.accumulate
        parts = []
        for first in range(process, shares, processes):
            share = {key: value[first::shares] for key, value in batch.items()}
            # The loss of the images divides by the mean weight of its share; undone, or shares would not add up.
            equal = torch.tensor(1 / self.profile.accumulate)
            part = equal * share["weight"].mean() / batch["weight"].mean()
            parts.append(share | {"part": part, "equal": equal})
        return parts

    def batch(self, step: int) -> dict[str, Tensor]:
        """The whole batch of a step, "t" and "noise" with it."""
        batch, size = self.data.batch(step), self.profile.batch
        rng = np.random.default_rng([self.profile.seed, step, 29])
        share = (np.arange(size) + rng.random()) / size  # stratified: every batch covers all noise levels
        noise = rng.standard_normal(tuple(batch["spet"].shape), dtype=np.float32)
        t = (share * self.times).astype(np.int64)
        return batch | {"t": torch.from_numpy(t), "noise": torch.from_numpy(noise)}

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of `MFdiff.forward`."""
        losses = model(part, part["t"], part["noise"])
        return {key: part["equal" if key == "fit" else "part"] * value for key, value in losses.items()}

    def check(self, model: MFdiff) -> dict[str, float]:
        """PSNR [dB] on the validation slices."""
        return self.validation.psnr(model)


def learning_rate(profile: Profile, step: int) -> float:
    """Linear warm-up, then a half cosine down to 2 % of the top."""
    if step < profile.warmup:
        return profile.learning_rate * (step + 1) / profile.warmup
    share = (step - profile.warmup) / max(1, profile.steps - profile.warmup)
    return profile.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


class ValidationSet:
    """A fixed set of slices of the validation anatomy: PSNR against SPET of the LPET, the coarse estimate and the mean
    of one sample pair."""

    def __init__(self, profile: Profile, workers: int | None = None, slices: int = 24):
        plain = dataclasses.replace(profile, seed=profile.seed + 1, crop=128)
        data = SliceDataset(make_cohort(profile, "validation", workers), plain, augment=False)
        self.batches = [data.batch(i, 4) for i in range(slices // 4)]

    @torch.no_grad()
    def psnr(self, model: MFdiff) -> dict[str, float]:
        """Mean PSNR [dB] over the slices of "lpet", "coarse" and "mean"."""
        device = next(model.parameters()).device
        scores: dict[str, list[float]] = {"lpet": [], "coarse": [], "mean": []}
        model.eval()
        for index, batch in enumerate(self.batches):
            lpet, mr, dose = (batch[k].to(device) for k in ("lpet", "mr", "dose"))
            pairs = [paired_noise(2, tuple(lpet.shape[-2:]), [index, i]) for i in range(len(lpet))]
            drawn, fused = model.restore_slices(lpet, mr, dose, torch.stack(pairs).to(device))
            images = {"lpet": lpet[:, lpet.shape[1] // 2], "coarse": fused.coarse[:, 0], "mean": drawn.mean(1)}
            spets, weights = (batch[key][:, 0].numpy() for key in ("spet", "weight"))
            for i, (spet, brain) in enumerate(zip(spets, weights >= 1, strict=True)):
                if brain.sum() > 100:
                    for key, image in images.items():
                        scores[key].append(psnr(image[i].cpu().numpy(), spet, brain))
        return {key: round(float(np.mean(values)), 4) for key, values in scores.items()}


def _student(profile: Profile, start: MFdiff | None) -> MFdiff:
    fresh = MFdiff.from_profile(profile)
    if start is not None:
        if start.settings != fresh.settings:
            raise ValueError(f"weights to start from: expected {fresh.settings}, found {start.settings}")
        fresh.load_state_dict(start.state_dict())
    return fresh


def _card(profile: Profile, cohort: str, start: MFdiff | None) -> dict[str, Any]:
    started = {} if start is None else {"started_from": {"fingerprint": start.fingerprint, "card": start.card}}
    return started | {
        "what": "MFdiff stage 1, exponential moving average of the weights",
        "profile": dataclasses.asdict(profile),
        "seed": profile.seed,
        "trained_on": {
            "anatomies": TRAIN_ANATOMIES,
            "virtual_patients": profile.patients,
            "slices": profile.patients * profile.slab,
            "cohort": cohort,
        },
        "validated_on": {"anatomies": VALIDATION_ANATOMIES, "virtual_patients": profile.validation_patients},
    }

"""Stage 1, supervised learning of generalized priors on the simulated cohort, as a generator: it trains and yields, the
caller logs, plots and stops.

Exact resume: batch, times and noise of a step depend on (seed, step) alone, so a checkpoint needs only weights,
average, optimizer and step. Several devices: `accelerate launch -m mfdiff_lite train …`; each process takes its share
of the same global batch, in `accumulate` parts one after the other if it does not fit; only the first one makes the
cohort and writes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cohort import SliceDataset, make_cohort
from .config import TRAIN_ANATOMIES, VALIDATION_ANATOMIES, Profile
from .metrics import psnr
from .model import MFdiff, paired_noise, pick_device, save_model
from .scan import whole_file

CHECKPOINT, WEIGHTS = "checkpoint.safetensors", "stage1.safetensors"


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """What a step of training shows. loss: parts of the loss, running means; validation: {step, lpet, coarse, mean}
    PSNR [dB] or None if this step did not validate; curve: all validations so far; model: the averaged weights,
    live."""

    step: int
    steps: int
    loss: dict[str, float]
    validation: dict[str, float] | None
    curve: list[dict[str, float]]
    seconds: float
    model: MFdiff


def train_stage1(
    profile: Profile,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    start: MFdiff | None = None,
) -> Iterator[TrainingState]:
    """Train MFdiff on the profile's cohort, yielding a `TrainingState` after each step.

    out: folder for checkpoints (every `checkpoint_every` steps, on Ctrl-C and at the end) and for the final weights;
    None keeps nothing. resume: go on from the checkpoint in `out` if there is one; the result equals that of an uncut
    run. start: a model of the same shape to start from instead of random weights. Ctrl-C finishes the step, saves, and
    raises KeyboardInterrupt. Raises ValueError if the checkpoint belongs to another profile or `start` another shape,
    FileExistsError if `out` holds a run and `resume` is off, FloatingPointError if the loss is no longer finite.
    """
    out = None if out is None else Path(out)
    held = refuse_or_resume(out, resume)
    chosen = pick_device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # Accelerator takes the current one
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="bf16" if chosen.type == "cuda" else "no")
    shares = accelerator.num_processes * profile.accumulate
    if profile.batch % shares:
        raise ValueError(
            f"batch: expected a multiple of processes x accumulate, found {profile.batch} for "
            f"{accelerator.num_processes} x {profile.accumulate}; choose another batch"
        )
    with accelerator.main_process_first():  # the others find it in the cache
        data = SliceDataset(make_cohort(profile, "train", workers), profile)
        validation = ValidationSet(profile, workers)
    fresh = MFdiff.from_profile(profile)
    if start is not None:
        if start.settings != fresh.settings:
            raise ValueError(f"weights to start from: expected {fresh.settings}, found {start.settings}")
        fresh.load_state_dict(start.state_dict())
    model = fresh.to(accelerator.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=profile.learning_rate, weight_decay=1e-4)
    step, seconds, curve, revision = 0, 0.0, [], code_revision()
    running: dict[str, float] = {}
    models = {"model": model, "average": average}
    made_with = dataclasses.asdict(profile) | {"started_from": None if start is None else start.fingerprint}
    if held:
        step, seconds, curve, running = load_checkpoint(out, made_with, models, optimizer).values()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    last = None

    def save() -> None:
        nonlocal last
        if out is not None and accelerator.is_main_process and last != step:
            out.mkdir(parents=True, exist_ok=True)
            progress = {"step": step, "seconds": seconds, "curve": curve, "running": running}
            save_checkpoint(out, made_with, models, optimizer, progress)
            last = step

    with interrupt_after_step() as interrupted, ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(_global_batch, data, profile, step, model.schedule.length)
        while step < profile.steps:
            began = time.monotonic()
            batch, t, noise = coming.result()
            coming = ahead.submit(_global_batch, data, profile, step + 1, model.schedule.length)  # meanwhile
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(profile, step)
            optimizer.zero_grad(set_to_none=True)
            now: dict[str, Tensor] = {}
            for first in range(accelerator.process_index, shares, accelerator.num_processes):
                share = slice(first, None, shares)
                # The loss divides by the mean weight of its share; undone, so that the shares average to the batch.
                part = float(batch["weight"][share].mean() / batch["weight"].mean()) / profile.accumulate
                some = {k: v[share].to(accelerator.device) for k, v in batch.items()}
                last_one = first + accelerator.num_processes >= shares
                with contextlib.nullcontext() if last_one else accelerator.no_sync(wrapped):
                    losses = wrapped(some, t[share].to(accelerator.device), noise[share].to(accelerator.device))
                    losses = {key: part * value for key, value in losses.items()}
                    accelerator.backward(sum(losses.values()))
                now = {key: now.get(key, 0) + value.detach() for key, value in losses.items()}
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            update_average(average, model, min(profile.ema, step / (step + 10)))
            for key, value in now.items():
                loss = accelerator.reduce(value, "mean").item()  # of the whole batch, alike in all processes
                running[key] = 0.98 * running.get(key, loss) + 0.02 * loss
            if not all(map(math.isfinite, running.values())):
                raise FloatingPointError(
                    f"stage 1: the loss is no longer finite at step {step}; "
                    f"lower learning_rate, now {profile.learning_rate:g}"
                )
            checked = None
            if (step % profile.validate_every == 0 or step == profile.steps) and accelerator.is_main_process:
                checked = {"step": step, **validation.psnr(average)}
                curve.append(checked)
            seconds += time.monotonic() - began
            if step % profile.checkpoint_every == 0 or step == profile.steps or interrupted.is_set():
                save()
            if interrupted.is_set():
                raise KeyboardInterrupt
            yield TrainingState(step, profile.steps, dict(running), checked, list(curve), seconds, average)
    if out is not None and accelerator.is_main_process:
        save_model(average, out / WEIGHTS, _card(profile, step, seconds, curve, revision, start))


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
        self.batches = [
            SliceDataset(make_cohort(profile, "validation", workers), plain, augment=False).batch(i, 4)
            for i in range(slices // 4)
        ]

    @torch.no_grad()
    def psnr(self, model: MFdiff) -> dict[str, float]:
        """Mean PSNR [dB] over the slices of "lpet", "coarse" and "mean"."""
        device = next(model.parameters()).device
        scores: dict[str, list[float]] = {"lpet": [], "coarse": [], "mean": []}
        model.eval()
        for index, batch in enumerate(self.batches):
            lpet, mr, dose = (batch[k].to(device) for k in ("lpet", "mr", "dose"))
            noise = torch.stack([paired_noise(2, tuple(lpet.shape[-2:]), [index, i]) for i in range(len(lpet))]).to(
                device
            )
            drawn, fused = model.restore_slices(lpet, mr, dose, noise)
            images = {"lpet": lpet[:, lpet.shape[1] // 2], "coarse": fused.coarse[:, 0], "mean": drawn.mean(1)}
            for i, (spet, weight) in enumerate(
                zip(batch["spet"][:, 0].numpy(), batch["weight"][:, 0].numpy(), strict=True)
            ):
                brain = weight >= 1
                if brain.sum() > 100:
                    for key, image in images.items():
                        scores[key].append(psnr(image[i].cpu().numpy(), spet, brain))
        return {key: round(float(np.mean(values)), 4) for key, values in scores.items()}


def _global_batch(
    data: SliceDataset, profile: Profile, step: int, length: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The batch, times and noise of a step, for all processes together."""
    batch = data.batch(step)
    rng = np.random.default_rng([profile.seed, step, 29])
    t = (
        (np.arange(profile.batch) + rng.random()) / profile.batch * length
    )  # stratified: every batch covers all noise levels
    noise = rng.standard_normal(tuple(batch["spet"].shape), dtype=np.float32)
    return batch, torch.from_numpy(t.astype(np.int64)), torch.from_numpy(noise)


@torch.no_grad()
def update_average(average: MFdiff, model: MFdiff, decay: float) -> None:
    """Move the averaged weights a step towards the model's: decay * average + (1 - decay) * model."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


@contextlib.contextmanager
def interrupt_after_step() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, so that a step is never cut in half (only the main thread can catch signals)."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def refuse_or_resume(out: Path | None, resume: bool) -> bool:
    """Whether `out` holds a run to go on with. Raises FileExistsError if it holds one and `resume` is off."""
    held = out is not None and (out / CHECKPOINT).exists()
    if held and not resume:
        raise FileExistsError(
            f"{out}: holds a training run already; continue it with --resume or choose another folder"
        )
    return held


def save_checkpoint(
    out: Path, made_with: dict[str, Any], models: dict[str, MFdiff], optimizer: Any, progress: dict[str, Any]
) -> None:
    """Everything that a run needs to go on exactly, in one file. made_with: what decides it; progress: where it is;
    both as JSON can hold them."""
    tensors = {f"{name}.{k}": v for name, model in models.items() for k, v in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    note = {"profile": made_with, "progress": progress}
    with whole_file(out / CHECKPOINT) as partial:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata={"note": json.dumps(note)}
        )


def load_checkpoint(out: Path, made_with: dict[str, Any], models: dict[str, MFdiff], optimizer: Any) -> dict[str, Any]:
    """Put a checkpoint back into models and optimizer; returns its progress. Raises ValueError if it is damaged or was
    made with something else."""
    from safetensors import SafetensorError, safe_open

    path = out / CHECKPOINT
    try:
        with safe_open(path, "pt") as stored:
            note = json.loads(stored.metadata()["note"])
            progress = note["progress"]
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a checkpoint of training, found a damaged file ({error}); delete it to start again"
        ) from None
    wanted = json.loads(json.dumps(made_with))
    changed = [key for key in wanted if note["profile"].get(key) != wanted[key]]
    if changed:
        found = ", ".join(f"{key}={note['profile'].get(key)}" for key in changed)
        raise ValueError(
            f"{path}: expected a run of these settings, found one with {found}; "
            "resume with the same settings or choose another --out"
        )
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    for name, model in models.items():
        held = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        model.load_state_dict(held)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def _card(
    profile: Profile, step: int, seconds: float, curve: list, revision: str, start: MFdiff | None
) -> dict[str, Any]:
    started = {} if start is None else {"started_from": {"fingerprint": start.fingerprint, "card": start.card}}
    return started | {
        "what": "MFdiff stage 1, exponential moving average of the weights",
        "profile": dataclasses.asdict(profile),
        "seed": profile.seed,
        "revision": revision,
        "steps": step,
        "training_minutes": round(seconds / 60, 1),
        "torch": torch.__version__,
        "trained_on": {
            "anatomies": TRAIN_ANATOMIES,
            "virtual_patients": profile.patients,
            "slices": profile.patients * profile.slab,
        },
        "validated_on": {"anatomies": VALIDATION_ANATOMIES, "virtual_patients": profile.validation_patients},
        "validation_psnr_db": curve,
        "licence": "MIT",
        "use": "teaching and research; not a medical device",
    }


def code_revision() -> str:
    """The git revision of this checkout, "+" if it has changes, or "unknown" outside git."""
    try:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

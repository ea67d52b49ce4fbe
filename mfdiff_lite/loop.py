"""The training loop, the same for both stages: for step k, an objective gives a loss.

    losses  = objective.loss(student, part) for each part of batch k       gradient = their sum
    student <- AdamW(student, clipped gradient, learning_rate(k))
    average <- ema * average + (1 - ema) * student                          what is validated and kept

Exact resume: what an objective gives for a step depends on the step alone, so a checkpoint needs only weights,
optimizer and progress. Several devices: `accelerate launch -m mfdiff_lite train …`; each process takes its share of the
same batch; only the first one writes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import whole_file
from .model import MFdiff, native_bfloat16, pick_device, save_model
from .revision import code_revision

try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
except ImportError as error:
    raise ImportError(
        "training: expected the package accelerate, found none; run: pip install 'mfdiff_lite[train]'"
    ) from error

CHECKPOINT = "checkpoint.safetensors"
MEMORY = 50  # steps that the running mean of a loss looks back over


class Objective(Protocol):
    """What a stage teaches. A part of a batch is a dict of CPU tensors; the losses of all parts of a step add up."""

    def parts(self, step: int, process: int, processes: int) -> list[dict[str, Tensor]]:
        """This process's share of batch number `step`, always the same for the same arguments."""

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named losses of a part, scalars."""

    def check(self, model: MFdiff) -> dict[str, float]:
        """Validation of the averaged weights, without gradient."""


@dataclass(frozen=True)
class Plan:
    """What a stage decides about its run. trained: the weights it moves; check_every, save_every: steps; patience:
    checks without a lower "loss" before it stops, and the weights of the lowest are kept, unless their check says that
    they are not "sound"; None: runs to the end and keeps the last. way: share of the way from the first weights to
    these that is gone. made_with: what decides the result, as JSON can hold it; card: of the final weights, without
    what the loop knows itself."""

    trained: list[nn.Parameter]
    steps: int
    learning_rate: Callable[[int], float]
    ema: float
    check_every: int
    save_every: int
    weights: str  # file name of the final weights
    curve: str  # what the card calls the validations
    made_with: dict[str, Any]
    card: dict[str, Any]
    weight_decay: float = 0.0
    patience: int | None = None
    way: float = 1.0


@dataclass(frozen=True)
class TrainingState:
    """What a step of training shows. loss: parts of the loss, running means; validation: of this step, {"step", ...},
    or None if it did not validate; curve: all validations so far; best: step of the weights to keep, 0 for those it
    started from; model: these weights, live, with their card; average: the averaged weights of this step."""

    step: int
    steps: int
    loss: dict[str, float]
    validation: dict[str, float] | None
    curve: list[dict[str, float]]
    best: int
    seconds: float
    model: MFdiff
    average: MFdiff


def training_loop(
    student: MFdiff, objective: Objective, plan: Plan, accelerator: Accelerator, out: Path | None, resume: bool
) -> Generator[TrainingState, None, None]:
    """Train `student`, yielding a `TrainingState` after each step; the caller logs, plots and stops.

    out: folder for checkpoints (every `save_every` steps, on Ctrl-C, when the caller stops, and at the end) and for the
    final weights; None keeps nothing. Ctrl-C finishes the step, saves, and raises KeyboardInterrupt. Raises ValueError
    if the checkpoint was made with something else, FloatingPointError if the loss is no longer finite.
    """
    run = _Run(student, objective, plan, accelerator, out)
    if resume:
        run.load()
    if run.ended:  # only its last file was left to write
        yield run.state()
    with ThreadPoolExecutor(1) as ahead, run.saved_when_the_caller_stops():
        coming = ahead.submit(run.parts, run.step)
        while not run.ended:
            with interrupt_after_step() as interrupted:
                began = time.monotonic()
                parts, coming = coming.result(), ahead.submit(run.parts, run.step + 1)  # meanwhile
                run.backward(parts)
                run.update(plan.learning_rate(run.step))
                run.step += 1
                run.follow()
                if run.step % plan.check_every == 0 or run.step == plan.steps:
                    run.check()
                run.seconds += time.monotonic() - began
                if run.step % plan.save_every == 0 or run.ended or interrupted.is_set():
                    run.save()
            if interrupted.is_set():
                raise KeyboardInterrupt
            yield run.state()
    run.finish()


@dataclass
class _Progress:
    """Where a run is, as JSON can hold it."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    running: dict[str, float] = field(default_factory=dict)
    revisions: list[str] = field(default_factory=list)  # of the code that made its steps


class _Run(_Progress):
    """The state of a run and what a step does to it."""

    def __init__(self, student: MFdiff, objective: Objective, plan: Plan, accelerator: Accelerator, out: Path | None):
        super().__init__()
        self.objective, self.plan, self.accelerator, self.out = objective, plan, accelerator, out
        self.saved: int | None = None
        self.revision = code_revision()
        self.student = student.to(accelerator.device)
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.kept = self.average if plan.patience is None else copy.deepcopy(self.average)
        self.first = copy.deepcopy(self.average) if plan.way < 1 else None
        optimizer = torch.optim.AdamW(plan.trained, lr=plan.learning_rate(0), weight_decay=plan.weight_decay)
        self.wrapped, self.optimizer = accelerator.prepare(self.student, optimizer)
        self.losses: dict[str, Tensor] = {}
        if plan.patience is not None:
            self.check()

    def parts(self, step: int) -> list[dict[str, Tensor]]:
        return self.objective.parts(step, self.accelerator.process_index, self.accelerator.num_processes)

    def backward(self, parts: list[dict[str, Tensor]]) -> None:
        """The gradient of the sum of all losses; processes exchange theirs with the last part."""
        self.student.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses = {}
        for number, part in enumerate(parts, start=1):
            here = {key: value.to(self.accelerator.device) for key, value in part.items()}
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    losses = self.objective.loss(self.wrapped, here)
                self.accelerator.backward(sum(losses.values()))
            for key, value in losses.items():
                self.losses[key] = self.losses.get(key, 0) + value.detach()

    def update(self, learning_rate: float) -> None:
        """One step of the optimizer on the clipped gradient, and of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.accelerator.clip_grad_norm_(self.plan.trained, 1.0)
        self.optimizer.step()
        update_average(self.average, self.student, min(self.plan.ema, (self.step + 1) / (self.step + 11)))

    def follow(self) -> None:
        """Running means of the losses: over all steps at first, over the last `MEMORY` later."""
        share = max(1 / MEMORY, 1 / self.step)
        for key, value in self.losses.items():
            loss = self.accelerator.reduce(value, "mean").item()  # of the whole batch, alike in all processes
            self.running[key] = (1 - share) * self.running.get(key, loss) + share * loss
        if not all(map(math.isfinite, self.running.values())):
            raise FloatingPointError(
                f"training: the loss is no longer finite at step {self.step}; lower learning_rate, now "
                f"{self.plan.learning_rate(self.step):.2g}"
            )

    def check(self) -> None:
        """Validate the average; with `patience`, keep it if it is the best so far."""
        if self.accelerator.is_main_process or self.plan.patience is not None:
            self.average.eval()
            self.curve.append({"step": self.step, **self.objective.check(self.average)})
            if self.plan.patience is not None and 0 < self.best == self.step:
                self.kept.load_state_dict(self.average.state_dict())
                if self.first is not None:
                    update_average(self.kept, self.first, self.plan.way)

    @property
    def best(self) -> int:
        """Step of the weights to keep."""
        sound = [one for one in self.curve if one.get("sound", True)]
        return self.step if self.plan.patience is None else int(min(sound, key=lambda one: one["loss"])["step"])

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or patience is over."""
        if self.plan.patience is not None:
            waited = self.curve[-1]["step"] - self.best
            return self.step >= self.plan.steps or waited >= self.plan.patience * self.plan.check_every
        return self.step >= self.plan.steps

    def state(self) -> TrainingState:
        validated = self.curve[-1] if self.curve and self.curve[-1]["step"] == self.step else None
        self.kept.card = self.plan.card | {
            "steps": self.best,
            "training_minutes": round(self.seconds / 60, 1),
            self.plan.curve: list(self.curve),
            "revision": ", ".join(self._revisions()),
            "torch": torch.__version__,
            "licence": "MIT",
            "use": "teaching and research; not a medical device",
        }
        return TrainingState(
            self.step,
            self.plan.steps,
            dict(self.running),
            validated,
            list(self.curve),
            self.best,
            self.seconds,
            self.kept,
            self.average,
        )

    # --- files -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def saved_when_the_caller_stops(self) -> Iterator[None]:
        """A caller that breaks off, or is interrupted between two steps, loses none."""
        try:
            yield
        except GeneratorExit:
            self.save()
            raise

    def save(self) -> None:
        """Everything that the run needs to go on exactly, in one file."""
        if self.out is None or not self.accelerator.is_main_process or self.saved == self.step:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.{k}": v for name, model in self._models().items() for k, v in model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        self.revisions = self._revisions()
        progress = {one.name: getattr(self, one.name) for one in fields(_Progress)}
        note = json.dumps({"made_with": self.plan.made_with, "progress": progress})
        with whole_file(self.out / CHECKPOINT) as partial:
            save_file(tensors, partial, metadata={"note": note})
        self.saved = self.step

    def load(self) -> None:
        """Go on from the checkpoint, if there is one. Raises ValueError if it is damaged or of another run."""
        if self.out is None or not (self.out / CHECKPOINT).exists():
            return
        note, tensors = _read_checkpoint(self.out / CHECKPOINT)
        _same_run(self.out / CHECKPOINT, note["made_with"], json.loads(json.dumps(self.plan.made_with)))
        for name, model in self._models().items():
            held = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            model.load_state_dict(held)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.__dict__.update(note["progress"])
        self.saved = self.step

    def _revisions(self) -> list[str]:
        return list(dict.fromkeys([*self.revisions, self.revision]))

    def _models(self) -> dict[str, MFdiff]:
        best = {} if self.kept is self.average else {"best": self.kept}
        return {"model": self.student, "average": self.average} | best

    def finish(self) -> None:
        """Write the final weights."""
        if self.out is not None and self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            kept = self.state().model
            save_model(kept, self.out / self.plan.weights, kept.card)


def accelerator_on(device: str, half: bool) -> Accelerator:
    """The engine that knows processes, devices and precision for `--device`. half: products in bfloat16 where the
    hardware multiplies it faster; not for an objective that takes small differences of outputs."""
    chosen = pick_device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # Accelerator takes the current one
    if os.environ.get("WORLD_SIZE", "1") == "1":
        AcceleratorState._reset_state(reset_partial_state=True)  # else it keeps the device of an earlier run
    precision = "bf16" if half and native_bfloat16(chosen) else "no"
    return Accelerator(cpu=chosen.type == "cpu", mixed_precision=precision)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
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


def refuse_to_mix(out: str | Path | None, resume: bool) -> Path | None:
    """`out` as a path. Raises FileExistsError if it holds a run and `resume` is off."""
    folder = None if out is None else Path(out)
    if folder is not None and (folder / CHECKPOINT).exists() and not resume:
        raise FileExistsError(
            f"{folder}: holds a training run already; continue it with --resume or choose another folder"
        )
    return folder


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as stored:
            note = json.loads(stored.metadata()["note"])
        if not {"made_with", "progress"} <= set(note):
            raise KeyError("no settings or no progress in it")
        return note, load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a checkpoint of training, found a damaged or older file ({error}); delete it to start "
            "again"
        ) from None


def _same_run(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        differs = ", ".join(f"{key}={found.get(key)}" for key in changed)
        raise ValueError(
            f"{path}: expected a run of these settings, found one with {differs}; "
            "resume with the same settings or choose another --out"
        )

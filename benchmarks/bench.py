"""Speed against what a user would take instead, and how cost grows: `make bench` (about 10 minutes on 2 idle cores).

    python benchmarks/bench.py --quick             a look; nothing is written
    python benchmarks/bench.py --train 30          PSNR after 30 minutes of CPU time of training, for each network

Everything that is compared is measured in turn (A B C A B C ...) in this process on one thread, with the time that the
processor spent on it; on a busy machine ratios still move by a quarter. Peers: the U-Nets of MONAI and diffusers at our
widths and number of parameters, and a deeper one, which get LPET and MR as channels, in the faster one of single
precision and bfloat16; the projector of the ASTRA toolbox on the CPU. Writes results/bench.json, results/bench.png and
the rows of group "speed" in results/targets.json.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import osem
from mfdiff_lite import metrics
from mfdiff_lite.cohort import SliceDataset, make_cohort
from mfdiff_lite.config import load_profile
from mfdiff_lite.denoiser import ConditionalUNet
from mfdiff_lite.diffusion import NoiseSchedule, diffuse, sample, velocity
from mfdiff_lite.model import STEPS, MFdiff, load_pretrained, native_bfloat16, paired_noise
from mfdiff_lite.phantom import virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner, subset_matrix
from mfdiff_lite.stage1 import ValidationSet, learning_rate
from results import RESULTS, Targets, volume_cost, write_json

GOALS = {
    "restore": (
        "restored slices a second, one sample, over the fastest peer's at its best precision",
        "x",
        ">=",
        9,
        15,
    ),
    "fast": ("quality fast over the fastest peer's 6 steps", "x", ">=", 30, 60),
    "training": ("training slices a second over the fastest peer's, each at its best precision", "x", ">=", 2.2, 3),
    "volume": ("K = 8 volume, against one slice at a time in single precision with nothing shared", "x", ">=", 1.5, 3),
    "volume_same": ("|PSNR of the two|", "dB", "<=", 0.02, None),
    "peak_restore": ("achieved over matmul FLOP/s, single precision, restoring", "%", ">=", 70, 85),
    "peak_training": ("achieved over matmul FLOP/s, single precision, training step", "%", ">=", 60, 75),
    "osem": ("OSEM of 16 slices over the same with the ASTRA toolbox's projector", "x", ">=", 2, 5),
    "linear": ("time of a slice of 256 slices against 64, difference", "%", "<=", 10, 5),
    "memory": ("peak memory of 256 slices over 64", "x", "<=", 1.2, 1.05),
}
TRAIN_GOALS = {"equal_time": ("PSNR after equal training time minus the best peer's", "dB", ">=", 0.5, 1.5)}
SIDE, CROP, BATCH = 128, 96, 8
PEERS = {
    "MONAI DiffusionModelUNet": (32, 64, 128),
    "diffusers UNet2DModel": (32, 64, 128),
    "diffusers UNet2DModel, deeper": (16, 32, 64, 128),  # as many weights, fewer of them at full resolution
}


def needed(package: str) -> Any:
    """A package of the extra `bench`. Raises ImportError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"benchmarks: expected the package {package}, found none ({error}); run: pip install '.[bench]'"
        ) from None


class Peer(nn.Module):
    """A U-Net of another package as a denoiser of (x_t, LPET, MR) by channels: widths of `PEERS`, one block a level,
    attention at the coarsest."""

    def __init__(self, name: str):
        super().__init__()
        widths, channels = PEERS[name], {"in_channels": 3, "out_channels": 1, "norm_num_groups": 8}
        if name.startswith("MONAI"):
            nets = needed("monai.networks.nets")
            levels = {"attention_levels": (False, False, True), "num_res_blocks": 1, "num_head_channels": 32}
            self.net = nets.DiffusionModelUNet(spatial_dims=2, channels=widths, **levels, **channels)
        else:
            plain = len(widths) - 1
            down, up = (*["DownBlock2D"] * plain, "AttnDownBlock2D"), ("AttnUpBlock2D", *["UpBlock2D"] * plain)
            levels = {"down_block_types": down, "up_block_types": up, "layers_per_block": 1}
            self.net = needed("diffusers").UNet2DModel(block_out_channels=widths, **levels, **channels)

    def forward(self, xt: Tensor, t: Tensor, lpet: Tensor, mr: Tensor) -> Tensor:
        v = self.net(torch.cat([xt, lpet, mr], dim=1), t)
        return v if isinstance(v, Tensor) else v.sample

    def restore(self, lpet: Tensor, mr: Tensor, noise: Tensor, steps: int = STEPS) -> Tensor:
        """One sample of each slice, all (B, 1, H, W)."""
        return sample(lambda xt, t: self(xt, t, lpet, mr), noise, NoiseSchedule(), steps)


# --- measuring ---------------------------------------------------------------------------------------------------


def in_turn(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each task, measured A B C A B C ... after one round to warm up."""
    spent: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            began = time.process_time()
            task()
            if number:
                spent[name].append(time.process_time() - began)
    return {name: float(np.median(seconds)) for name, seconds in spent.items()}


def matmul(dtype: torch.dtype, size: int = 1024) -> Callable[[], Tensor]:
    """The machine's peak as a task: a product of square matrices, 2 size^3 operations."""
    a = torch.randn(size, size).to(dtype)
    return lambda: a @ a


def operations(task: Callable[[], Any]) -> float:
    """Floating-point operations of the products and convolutions of a task."""
    with FlopCounterMode(display=False) as counter:
        task()
    return float(counter.get_total_flops())


def full_head(slices: int, side: int = SIDE) -> Scan:
    """A noisy head that fills the field of view but for what its smoothed rim needs: every network works on side x
    side."""
    rng = np.random.default_rng(0)
    x, y = np.indices((side, side)) - (side - 1) / 2
    head = (np.maximum(abs(x), abs(y)) < side / 2 - 7)[..., None]
    lpet, mr = (rng.gamma(2, 5, (side, side, slices)) * head for _ in range(2))
    return Scan(lpet.astype(np.float32), mr.astype(np.float32), dose_reduction=20)


@contextlib.contextmanager
def plain(model: MFdiff) -> Iterator[None]:
    """The same model with nothing shared, nothing fused, one slice at a time: what restoring was before this bench."""

    def given(self, lpet, feature, dose):
        def denoise(xt, time):
            k = len(xt) // len(lpet)
            return self(xt, time, *(one.repeat_interleave(k, 0) for one in (lpet, feature, dose)))

        return denoise

    model.to(memory_format=torch.contiguous_format)
    with (
        mock.patch("mfdiff_lite.model.BATCH", 1),
        mock.patch("mfdiff_lite.model.native_bfloat16", lambda device: False),
        mock.patch.object(ConditionalUNet, "given", given),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield
    model.to(memory_format=torch.channels_last)


def kinds() -> list[str]:
    """Precisions in which a network is tried here: who is faster in bfloat16 may use it."""
    return ["float32"] + (["bfloat16"] if native_bfloat16(torch.device("cpu")) else [])


def under(precision: str, task: Callable[[], Any]) -> Callable[[], Any]:
    """A task in "float32" or "bfloat16", without gradients."""

    @torch.no_grad()
    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return task()

    return run


# --- what is measured ----------------------------------------------------------------------------------------------


def restoring(model: MFdiff, rounds: int, side: int = SIDE, slices: int = BATCH) -> dict[str, Any]:
    """Slices a second of ours and the peers, one sample in 6 steps, and of ours without samples; the peak beside it."""
    scan = full_head(slices, side)
    tasks: dict[str, Callable[[], Any]] = {}
    for kind in kinds():
        how = "float32" if kind == "float32" else "auto"
        tasks[f"ours, {kind}"] = lambda how=how: model.restore(scan, 1, precision=how)
        tasks[f"ours fast, {kind}"] = lambda how=how: model.restore(scan, 0, precision=how)
        tasks[f"matmul, {kind}"] = matmul(getattr(torch, kind))
    lpet, mr, noise = torch.randn(3, slices, 1, side, side)
    parameters = {"ours": model.n_parameters}
    for name in PEERS:
        peer = Peer(name).eval().to(memory_format=torch.channels_last)
        parameters[name] = sum(p.numel() for p in peer.parameters())
        for kind in kinds():
            tasks[f"{name}, {kind}"] = under(kind, lambda peer=peer: peer.restore(lpet, mr, noise))
    seconds = in_turn(tasks, rounds)
    rates = {name: slices / s for name, s in seconds.items() if not name.startswith("matmul")}
    peaks = {name.split(", ")[1]: 2 * 1024**3 / s for name, s in seconds.items() if name.startswith("matmul")}
    work = operations(lambda: model.restore(scan, 1, precision="float32"))
    achieved = {kind: work / seconds[f"ours, {kind}"] / peaks[kind] for kind in kinds()}
    return {"slices_a_second": rates, "parameters": parameters, "peak_flops": peaks, "achieved_over_peak": achieved}


def steps_of_training(rounds: int, crop: int = CROP, batch: int = BATCH) -> dict[str, Any]:
    """Training slices a second: forward, backward, AdamW."""
    g = torch.Generator().manual_seed(0)
    profile = load_profile("cpu")
    model = MFdiff.from_profile(profile).train()
    lpet, mr = torch.rand(2, batch, model.context, crop, crop, generator=g)
    spet, noise = torch.rand(2, batch, 1, crop, crop, generator=g)
    data = {"lpet": lpet, "mr": mr, "spet": spet, "weight": torch.ones_like(spet), "dose": torch.full((batch,), 20.0)}
    t = torch.randint(0, 1000, (batch,), generator=g)

    def step(network: nn.Module, loss: Callable[[], Tensor], kind: str) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
                wrong = loss()
            wrong.backward()
            optimizer.step()

        return run

    tasks = {"matmul": matmul(torch.float32)}
    for kind in kinds():
        tasks[f"ours, {kind}"] = step(model, lambda: sum(model(data, t, noise).values()), kind)
        for name in PEERS:
            peer = Peer(name).train()
            tasks[f"{name}, {kind}"] = step(peer, lambda peer=peer: peer_loss(peer, data, t, noise), kind)
    work = operations(tasks["ours, float32"])
    seconds = in_turn(tasks, rounds)
    peak = 2 * 1024**3 / seconds.pop("matmul")
    rates = {name: batch / s for name, s in seconds.items()}
    return {"slices_a_second": rates, "achieved_over_peak": work / seconds["ours, float32"] / peak}


def peer_loss(peer: Peer, batch: dict[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
    """The plain conditional diffusion loss: the denoiser generates what the SPET is beyond the LPET's mean of 1."""
    schedule, middle = NoiseSchedule(), batch["lpet"].shape[1] // 2
    x0, lpet, mr = batch["spet"] - 1, batch["lpet"][:, middle, None], batch["mr"][:, middle, None]
    wrong = peer(diffuse(x0, noise, t, schedule), t, lpet, mr) - velocity(x0, noise, t, schedule)
    return (batch["weight"] / batch["weight"].mean() * wrong**2).mean()


def volume(model: MFdiff, scan: Scan, rounds: int) -> dict[str, Any]:
    """The K = 8 volume as it is and as it was; time and PSNR of the qualities and of 50 DDIM steps from noise."""
    made: dict[str, Any] = {}

    def keep(name: str, **how: Any) -> Callable[[], None]:
        return lambda: made.update({name: model.restore(scan, **how)})

    def before() -> None:
        with plain(model):
            keep("before", n_samples=8)()

    tasks = {"now": keep("now", n_samples=8), "float32": keep("float32", n_samples=8, precision="float32")}
    seconds = in_turn(tasks | {"before": before, "fast": keep("fast", n_samples=0)}, rounds)
    slow = {"n_samples": 8, "steps": 50, "start": 1.0, "method": "ddim"}
    seconds |= in_turn({"50 DDIM steps": keep("50 DDIM steps", **slow)}, 0 if rounds == 0 else 1)
    psnr = {name: metrics.psnr(one.mean, scan.spet, scan.mask) for name, one in made.items()}
    return {"slices": scan.lpet.shape[2], "cpu_seconds": seconds, "psnr_db": psnr}


def reconstruction(rounds: int, slices: int = 16, subsets: int = 21) -> dict[str, Any]:
    """OSEM, one iteration without PSF, of ours (SciPy, PyTorch) and with ASTRA's projector; and how near a product
    comes to the bytes that it must move."""
    astra = needed("astra")
    scanner = Scanner(model_psf=False, iterations=1, subsets=subsets)
    rng = np.random.default_rng(0)
    activity = rng.gamma(2, 5, (scanner.matrix, scanner.matrix, slices)).astype(np.float32)
    sinogram = scanner.acquire(activity, np.full_like(activity, 0.02), seed=0)
    grid = astra.create_vol_geom(scanner.matrix, scanner.matrix)
    angles = np.pi * np.arange(scanner.angles) / scanner.angles
    beams = [
        astra.OpTomo(
            astra.create_projector(
                "linear", astra.create_proj_geom("parallel", 1.0, scanner.matrix, angles[s::subsets]), grid
            )
        )
        for s in range(subsets)
    ]

    def with_astra() -> np.ndarray:
        found = np.ones_like(activity)
        for z in range(slices):
            for s, beam in enumerate(beams):
                gain, counts, background = (
                    getattr(sinogram, key)[s::subsets, :, z] for key in ("sensitivity", "counts", "background")
                )
                expected = gain * scanner.pixel_size * beam.FP(found[..., z]) + background
                ratio = beam.BP(gain * counts / np.maximum(expected, 1e-9))
                found[..., z] *= ratio / np.maximum(beam.BP(gain), 1e-6)
        return found

    rows = subset_matrix(scanner.matrix, scanner.pixel_size, scanner.angles, 0, subsets)
    image = activity.reshape(-1, slices)
    other = np.empty(2**25, np.uint8)
    tasks = {
        "SciPy": lambda: scanner.reconstruct(sinogram),
        "PyTorch": lambda: osem.reconstruct(scanner, sinogram),
        "ASTRA": with_astra,
        "product": lambda: rows @ image,
        "copy": lambda: other.copy(),
    }
    seconds = in_turn(tasks, rounds)
    moved = rows.data.nbytes + rows.indices.nbytes + 4 * slices * sum(rows.shape)  # each once, the images from cache
    return {
        "slices": slices,
        "cpu_seconds": {key: seconds[key] for key in ("SciPy", "PyTorch", "ASTRA")},
        "product_gb_a_second": moved / seconds["product"] / 1e9,
        "copy_gb_a_second": 2 * other.nbytes / seconds["copy"] / 1e9,
    }


def growth(quick: bool) -> dict[str, Any]:
    """Seconds and peak memory over slices, of cohorts over patients and processes; seconds to import and to a first
    picture."""
    costs = [volume_cost(slices) for slices in ((4, 8) if quick else (16, 64, 256))]
    return {"slices": costs, "cohort": cohorts((1, 2) if quick else (1, 10, 100)), "starting": starting()}


def cohorts(sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Wall seconds to simulate patients of one slice and one dose."""
    rows = []
    for patients in sizes:
        for workers in (1, 2) if patients >= 8 else (1,):
            with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, MFDIFF_CACHE=cache):
                began = time.monotonic()
                make_cohort(load_profile("smoke", patients=patients, slab=1, doses=1, context=1), "train", workers)
                rows.append({"patients": patients, "processes": workers, "seconds": time.monotonic() - began})
    return rows


def starting() -> dict[str, float]:
    """Wall seconds, each in a process of its own."""
    first = (
        "import mfdiff_lite as mf; from mfdiff_lite.look import figure\n"
        "scan = mf.Scanner().scan(mf.virtual_patient(mf.load_anatomy('icbm152'), 1, slices=5))\n"
        "figure(scan, mf.load_pretrained('cpu').restore(scan, 0))\n"
    )
    spent = {}
    for name, code in {"import mfdiff_lite": "import mfdiff_lite", "first picture": first}.items():
        began = time.monotonic()
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
        spent[name] = time.monotonic() - began
    return spent


# --- equal time of training ------------------------------------------------------------------------------------------


def equal_time(minutes: float, profile_name: str = "cpu", workers: int | None = None) -> dict[str, Any]:
    """Train ours and the peers for the same CPU time on the same batches; PSNR of the mean of two samples."""
    profile = load_profile(profile_name)
    data = SliceDataset(make_cohort(profile, "train", workers), profile)
    judge = ValidationSet(profile, workers)
    found: dict[str, Any] = {"minutes": minutes, "profile": profile_name, "psnr_db": {}, "steps": {}}
    for name in ("ours", *PEERS):
        torch.manual_seed(0)
        network = MFdiff.from_profile(profile) if name == "ours" else Peer(name)
        steps = train_for(network, data, minutes * 60)
        scores = judge.psnr(network) if isinstance(network, MFdiff) else {"mean": peer_psnr(network, judge)}
        found["psnr_db"][name], found["steps"][name] = scores["mean"], steps
        print(f"{name}: {steps} steps, {scores['mean']:.2f} dB", flush=True)
    return found


def train_for(network: MFdiff | Peer, data: SliceDataset, seconds: float) -> int:
    """AdamW on batches 0, 1, 2 ... with the learning rate of stage 1, its schedule stretched over the CPU seconds; in
    bfloat16 where the CPU has it."""
    profile, began, step, share = data.profile, time.process_time(), 0, 0.0
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    while share < 1:
        batch = data.batch(step)
        t = torch.randint(0, 1000, (len(batch["dose"]),), generator=generator)
        noise = torch.randn(batch["spet"].shape, generator=generator)
        warm = min(1.0, (step + 1) / max(1, profile.warmup))
        for group in optimizer.param_groups:
            group["lr"] = warm * learning_rate(
                profile, profile.warmup + round(share * (profile.steps - profile.warmup))
            )
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in kinds()):
            ours = isinstance(network, MFdiff)
            loss = sum(network(batch, t, noise).values()) if ours else peer_loss(network, batch, t, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step, share = step + 1, (time.process_time() - began) / seconds
    network.eval()
    return step


@torch.no_grad()
def peer_psnr(peer: Peer, judge: ValidationSet) -> float:
    """PSNR [dB] of the mean of a pair of samples on the validation slices, as `ValidationSet.psnr` has it."""
    scores = []
    for index, batch in enumerate(judge.batches):
        middle = batch["lpet"].shape[1] // 2
        lpet, mr = batch["lpet"][:, middle, None], batch["mr"][:, middle, None]
        pairs = torch.stack([paired_noise(2, tuple(lpet.shape[-2:]), [index, i]) for i in range(len(lpet))])
        drawn = sum(peer.restore(lpet, mr, pairs[:, k, None]) + 1 for k in (0, 1)) / 2
        for image, spet, weight in zip(
            drawn[:, 0].numpy(), batch["spet"][:, 0].numpy(), batch["weight"][:, 0], strict=True
        ):
            brain = weight.numpy() >= 1
            if brain.sum() > 100:
                scores.append(metrics.psnr(image, spet, brain))
    return float(np.mean(scores))


# --- results -----------------------------------------------------------------------------------------------------


def fill(targets: Targets, found: dict[str, Any]) -> None:
    """The rows of group "speed" from what was measured."""
    rates, training = found["restoring"]["slices_a_second"], found["training"]["slices_a_second"]

    def best(of: dict[str, float], who: tuple[str, ...]) -> float:
        return max(rate for name, rate in of.items() if name.startswith(who))

    peers = tuple(PEERS)
    targets.add("restore", best(rates, ("ours, ",)) / best(rates, peers))
    targets.add("fast", best(rates, ("ours fast",)) / best(rates, peers))
    targets.add("training", best(training, ("ours",)) / best(training, peers))
    seconds, psnr = found["volume"]["cpu_seconds"], found["volume"]["psnr_db"]
    targets.add("volume", seconds["before"] / seconds["now"])
    targets.add("volume_same", abs(psnr["now"] - psnr["before"]))
    targets.add("peak_restore", 100 * found["restoring"]["achieved_over_peak"]["float32"])
    targets.add("peak_training", 100 * found["training"]["achieved_over_peak"])
    times = found["reconstruction"]["cpu_seconds"]
    targets.add("osem", times["ASTRA"] / min(times["SciPy"], times["PyTorch"]))
    _, middle, most = found["growth"]["slices"]
    a_slice = [row["cpu_seconds"] / row["slices"] for row in (middle, most)]
    targets.add("linear", 100 * abs(a_slice[1] / a_slice[0] - 1))
    targets.add("memory", most["peak_gb"] / middle["peak_gb"])


def block(found: dict[str, Any]) -> str:
    """The table for the results page, in Markdown."""
    rates, training = found["restoring"]["slices_a_second"], found["training"]["slices_a_second"]
    names, count = ("ours", *PEERS), found["restoring"]["parameters"]
    tried = ("float32", "bfloat16")
    heads = [f"{what}, {kind}" for what in ("restore", "training") for kind in tried]
    lines = [f"| | parameters | {' | '.join(heads)} |", "|---" * 6 + "|"]
    for name in names:
        found_rates = [one.get(f"{name}, {kind}") for one in (rates, training) for kind in tried]
        cells = ["-" if rate is None else f"{rate:.2f}" for rate in found_rates]
        lines.append(f"| {name} | {count[name] / 1e6:.1f} M | {' | '.join(cells)} |")
    fast = [rates.get(f"ours fast, {kind}") for kind in tried]
    cells = ["-" if rate is None else f"{rate:.2f}" for rate in fast]
    lines.append(f"| ours, quality fast | | {' | '.join(cells)} | | |")
    return "\n".join([*lines, "", "Slices a second of CPU time on one thread, 128 x 128, one sample in 6 steps; "
                      "training steps of 8 slices of 96 x 96."]) + "\n"  # fmt: skip


def picture(found: dict[str, Any], path: Path) -> None:
    """Slices a second as bars, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = found["restoring"]["slices_a_second"]
    names = sorted(rates, key=lambda name: rates[name])
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(names) + 1.2), facecolor="white")
    colours = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in names]
    bars = axes.barh(names, [rates[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xscale="log", xlabel="slices a second of CPU time, one thread", title="Restoring 128 x 128, 6 steps")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def machine() -> dict[str, Any]:
    """Where it was measured, and how busy that was."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16_in_hardware": native_bfloat16(torch.device("cpu")),
        "load_of_the_machine": load,
        "versions": {"torch": torch.__version__}
        | {name: needed(name).__version__ for name in ("monai", "diffusers", "astra")},
    }


def measure(quick: bool) -> dict[str, Any]:
    """All but the equal time of training."""
    model, rounds = load_pretrained("cpu"), 1 if quick else 3
    slices = 2 if quick else 8
    scan = Scanner().scan(virtual_patient(load_anatomy("ahba-15697"), 123, slices=slices), 20)
    found = {"machine": machine()}
    for name, task in {
        "restoring": lambda: restoring(model, rounds, 64 if quick else SIDE, 2 if quick else BATCH),
        "training": lambda: steps_of_training(rounds, 32 if quick else CROP, 2 if quick else BATCH),
        "volume": lambda: volume(model, scan, rounds),
        "reconstruction": lambda: reconstruction(rounds, 2 if quick else 16),
        "growth": lambda: growth(quick),
    }.items():
        began = time.monotonic()
        found[name] = task()
        print(f"{name}: {time.monotonic() - began:.0f} s\n{json.dumps(found[name], indent=1)}", flush=True)
    return found


def main(
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes; nothing is written")] = False,
    train: Annotated[float | None, typer.Option(help="only the equal time of training, so many minutes each")] = None,
) -> None:
    """Measure the package's speed against its peers'."""
    torch.set_num_threads(1)
    held = json.loads((RESULTS / "bench.json").read_text()) if (RESULTS / "bench.json").exists() else {}
    if train is not None:
        targets = Targets("speed", TRAIN_GOALS, f"make bench ARGS='--train {train:g}'")
        scores = (found := equal_time(train))["psnr_db"]
        targets.add("equal_time", scores["ours"] - max(score for name, score in scores.items() if name != "ours"))
        held["equal_time"] = found | {"revision": targets.revision}
    else:
        targets = Targets("speed", GOALS, "make bench")
        found = measure(quick)
        print(block(found))
        if quick:
            return
        fill(targets, found)
        held |= found | {"revision": targets.revision}
        picture(found, RESULTS / "bench.png")
    write_json("bench.json", held)
    targets.write()
    targets.show()


if __name__ == "__main__":
    typer.run(main)

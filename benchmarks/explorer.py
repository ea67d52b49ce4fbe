"""Cost of the slice explorer: kernel time of one tick of the slider, and memory after many of them.

Four volumes of 128^3 with noise in them (the hardest to compress), no front end. Limits: 25 ms, no growth.
"""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mfdiff_lite.explorer import PLANES, SliceExplorer, explore

NAMES = ("LPET", "SPET", "MR", "restored")


def volumes(size: int) -> dict[str, np.ndarray]:
    """A noisy ball that fills the volume, in every pane with noise of its own."""
    radius = np.sqrt(sum((axis - (size - 1) / 2) ** 2 for axis in np.ogrid[:size, :size, :size]))
    ball = (radius < 0.47 * size).astype(np.float32)
    draws = (np.random.default_rng(seed).gamma(2, 3, ball.shape) for seed in range(len(NAMES)))
    return {name: ball * noise.astype(np.float32) for name, noise in zip(NAMES, draws, strict=True)}


def ticks(view: SliceExplorer, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of CPU and of wall time of each of `count` steps of the slider, up and down its range."""
    slider, spent = view.slice, []
    there = range(slider.min, slider.max + 1)
    slider.value = slider.max
    for target in itertools.islice(itertools.cycle([*there[-2::-1], *there[1:]]), count):
        began = time.process_time(), time.perf_counter()
        slider.value = target
        spent.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return 1000 * np.transpose(spent)


def resident() -> float:
    """MiB of memory that this process holds (Linux only; NaN elsewhere)."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * 4096 / 2**20


def main(
    size: Annotated[int, typer.Option(help="Voxels along each side of a volume.")] = 128,
    count: Annotated[int, typer.Option(help="Ticks for the memory; the times are medians of as many.")] = 1000,
    crosshair: Annotated[bool, typer.Option(help="With crosshair, values and MR under the PET.")] = False,
) -> None:
    """Measure the explorer and print milliseconds per tick and the growth of memory."""
    view = explore(volumes(size))
    view.crosshair.value, view.blend.value = crosshair, float(crosshair)
    panes = ", ".join(view.values)
    typer.echo(f"{len(NAMES)} volumes of {size}^3, panes {panes}")
    for plane in PLANES:
        view.plane.value = plane
        cpu, wall = ticks(view, max(20, count // 10))
        typer.echo(
            f"{plane:9} {np.median(cpu):6.1f} ms of CPU per tick, {np.median(wall):6.1f} ms of wall time (medians)"
        )
    before = resident()
    cpu, _ = ticks(view, count)
    typer.echo(
        f"memory after {count} ticks: {resident() - before:+.1f} MiB; median {np.median(cpu):.1f} ms of CPU per tick"
    )


if __name__ == "__main__":
    typer.run(main)

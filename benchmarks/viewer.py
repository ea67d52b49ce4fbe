"""What the viewer costs and whether it fits, measured in headless Chromium.

    make viewer-targets

Six volumes of 128^3 with noise in them (the hardest to draw and to compress): from key or wheel to pixels, and frames
shown while a key is held. The stored head, six panes: height at 1280 x 720 and size in a page of six volumes of
128 x 128 x 64. Notebooks: those with a control, by what they hold once executed. Pictures of a reopened notebook and
the list of browser tests are read off tests/test_browser.py. Writes the rows of group "viewer" in results/targets.json.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import nbformat
import numpy as np
import typer

import mfdiff_lite as mf
from results import Targets

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("LPET", "SPET", "MR", "restored", "SD", "coarse")
TESTED = ("mouse", "wheel", "keys", "curtain", "circle", "ortho", "reopened", "from_disk", "report")
GOALS = {
    "key_to_pixels": ("key or wheel to pixels, six volumes of 128^3, median in Chromium", "ms", "<=", 20.0, 12.0),
    "frames": ("frames shown of 60 keys at 30 per second, same volumes", "frames", ">=", 57.0, 60.0),
    "height": ("height of a case of six panes at 1280 x 720, controls included", "px", "<=", 640.0, 600.0),
    "size": ("one viewer in a page, six volumes of 128 x 128 x 64 of the stored head", "MB", "<=", 3.0, 1.5),
    "notebooks": ("notebooks with a control that works without a kernel", "notebooks", ">=", 10.0, 10.0),
    "reopened": ("pictures per viewer of a reopened notebook, trusted and not, worst", "pictures", "<=", 1.0, 1.0),
    "tested": ("of nine things that a browser test does, those with a test that passes", "tests", ">=", 9.0, 9.0),
}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# Milliseconds from an event to the frame after the one in which the picture was drawn.
SPENT = """async () => {
    const v = [...globalThis.mfdiffViewers.waiting.values()][0][0], spent = [];
    const canvas = v.root.querySelector("canvas"), frame = () => new Promise(done => requestAnimationFrame(done));
    for (let n = 0; n < 60; n++) {
        await new Promise(done => setTimeout(done, 20 + 7 * (n % 5)));
        const began = performance.now(), drawn = v.host.dataset.drawn;
        if (n % 2) v.frame.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
        else canvas.dispatchEvent(new WheelEvent("wheel", {deltaY: -100, bubbles: true, cancelable: true}));
        while (v.host.dataset.drawn === drawn) await frame();
        spent.push(performance.now() - began);
    }
    return spent;
}"""
HELD = """async () => {
    const v = [...globalThis.mfdiffViewers.waiting.values()][0][0], first = Number(v.host.dataset.drawn);
    v.slide(1);
    await new Promise(done => setTimeout(done, 300));
    const before = Number(v.host.dataset.drawn);
    for (let n = 0; n < 60; n++) {
        v.frame.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
        await new Promise(done => setTimeout(done, 1000 / 30));
    }
    await new Promise(done => setTimeout(done, 300));
    return Number(v.host.dataset.drawn) - before;
}"""


def volumes(size: int) -> dict[str, np.ndarray]:
    """A noisy ball that fills the volume, in every pane with noise of its own."""
    radius = np.sqrt(sum((axis - (size - 1) / 2) ** 2 for axis in np.ogrid[:size, :size, :size]))
    ball = (radius < 0.47 * size).astype(np.float32)
    draws = (np.random.default_rng(seed).gamma(2, 3, ball.shape) for seed in range(len(NAMES)))
    return {name: ball * noise.astype(np.float32) for name, noise in zip(NAMES, draws, strict=True)}


def six() -> mf.look.Viewer:
    """The stored head in six panes, brought to 128 x 128 x 64."""
    scan, restored = mf.load_example()
    grow = [(0, 128 - n) if axis < 2 else (0, 64 - n) for axis, n in enumerate(scan.lpet.shape)]
    images = {"LPET": scan.lpet, "SPET": scan.spet, "MR": scan.mr, **restored}
    return mf.explore({name: np.pad(image, grow, "edge") for name, image in images.items()}, unit=scan.unit)


def in_the_browser(targets: Targets, folder: Path) -> None:
    """Speed, frames, height."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise typer.BadParameter("expected Chromium, found none (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        for name, view in (("speed", mf.explore(volumes(128))), ("six", six().set(show=list(NAMES[:5]) + ["gate"]))):
            page.goto(view.save(folder / f"{name}.html").as_uri())
            page.wait_for_selector("[data-ready]", timeout=180_000)
            if name == "speed":
                spent = page.evaluate(SPENT)
                print(f"key or wheel to pixels: {np.percentile(spent, [10, 50, 90]).round(1)} ms (p10, p50, p90)")
                targets.add("key_to_pixels", float(np.median(spent)))
                targets.add("frames", min(60, page.evaluate(HELD)))
            else:
                targets.add("height", page.locator("section").bounding_box()["height"])
        browser.close()


def live_notebooks(executed: Path) -> int:
    """How many executed notebooks hold a viewer that needs no kernel."""
    subprocess.run([sys.executable, "notebooks/run.py", "--out", str(executed)], cwd=ROOT, check=True)
    pages = [nbformat.read(path, as_version=4) for path in executed.glob("[0-9]*.ipynb")]
    shown = ([str(o.get("data", {}).get("text/html")) for c in p.cells for o in c.get("outputs", [])] for p in pages)
    return sum(any("mfdiff-viewer" in text for text in texts) for texts in shown)


def tested() -> tuple[int, int]:
    """(pictures of a reopened notebook, worst of trusted and not; things tested), by the browser tests' own verdict."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-rA", "tests/test_browser.py"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    good = "failed" not in said.splitlines()[-1] and "skipped" not in said.splitlines()[-1]
    words = "\n".join(re.findall(r"^PASSED .*", said, re.MULTILINE)).lower()
    held = {"curtain": "compare", "circle": "compare", "ortho": "compare", "wheel": "mouse"}
    count = sum(held.get(name, name) in words for name in TESTED) if good else 0
    return (1 if "reopened" in words else 2), count


def main(quick: Annotated[bool, typer.Option(help="browser and size alone; nothing is written")] = False) -> None:
    """Measure the viewer."""
    targets = Targets("viewer", GOALS, "make viewer-targets")
    with tempfile.TemporaryDirectory(prefix="mfdiff_viewer_") as folder:
        in_the_browser(targets, Path(folder))
        targets.add("size", len(six().html().encode()) / 1e6)
        if not quick:
            targets.add("notebooks", live_notebooks(Path(folder)))
            pictures, count = tested()
            targets.add("reopened", pictures)
            targets.add("tested", count)
            targets.write()
    targets.show()


if __name__ == "__main__":
    typer.run(main)

"""Cost and truth of the page that restores in a browser: `make web`, then `make web-targets`.

Opens runs/web/try.html from disk in headless Chromium, without a GPU, alone on the machine. Writes the rows of group
"web" in results/targets.json.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import typer

from results import Targets

SITE = Path(__file__).resolve().parents[1] / "runs" / "web"
GOALS = {
    "size": ("whole folder of the page", "MB", "<=", 40.0, 25.0),
    "first_picture": ("first picture after opening from disk", "s", "<=", 5.0, 2.0),
    "coarse": ("coarse estimate of a slice, WebAssembly", "s", "<=", 1.5, 0.6),
    "sample": ("coarse estimate and one sample of a slice, WebAssembly", "s", "<=", 6.0, 2.5),
    "agreement": ("PSNR of the page's mean against the package's, same noise", "dB", ">=", 60.0, 70.0),
}
ONE = """async () => {
    const { settings, page } = MFDIFF, size = settings.padded[0] * settings.padded[1];
    page.state.view = null;
    const noise = (pair) => normalNoise(size, pair);
    const done = await page.compute(page.state.scan, { z: 4, samples: 1, fidelity: 0, noise });
    return [done.coarseSeconds, done.seconds];
}"""


def measure(page: Any, targets: Targets) -> None:
    """Open, restore a few times, compare."""
    page.set_default_timeout(180_000)
    page.goto((SITE / "try.html").as_uri())
    page.wait_for_function("MFDIFF.firstPicture")
    targets.add("first_picture", page.evaluate("MFDIFF.firstPicture") / 1000)
    page.wait_for_function("document.getElementById('told').textContent.startsWith('Done')")
    page.click("#check")
    page.wait_for_function("MFDIFF.checked")
    targets.add("agreement", page.evaluate("MFDIFF.checked.agreement"))
    spent = [page.evaluate(ONE) for _ in range(5)]
    for name, seconds in zip(("coarse", "sample"), zip(*spent, strict=True), strict=True):
        targets.add(name, statistics.median(seconds))


def main() -> None:
    """Measure what the page costs a reader's machine, and that it restores what the package restores."""
    from playwright.sync_api import sync_playwright

    if not (SITE / "try.html").is_file():
        raise typer.BadParameter(f"expected the page in {SITE}, found none; run 'make web' first")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    targets = Targets("web", GOALS, "make web-targets")
    targets.add("size", sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file()) / 1e6)
    with sync_playwright() as playwright:
        flags = ["--headless", "--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        measure(browser.new_page(viewport={"width": 1280, "height": 1000}), targets)
        browser.close()
    targets.write()
    targets.show()


if __name__ == "__main__":
    typer.run(main)

"""The explorer in a real browser: JupyterLab on the loopback address, headless Chromium, keys that are pressed.

One server and one browser serve all tests of this file (of a worker; they are few and stand together, so that one
worker of pytest-xdist gets them). Screenshots are kept in runs/browser/.
"""

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "runs" / "browser"
GAP = 4  # pixels between panes
PATIENCE = 60  # seconds; what works takes less than one, unless the machine is busy
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # what is asked for elsewhere is not found
]  # fmt: skip
SETTINGS = {  # of JupyterLab: no news from elsewhere, and all cells in the page whether they are in view or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
TOY = """
import numpy as np
from mfdiff_lite.look import explore, page
volumes = {name: np.random.default_rng(k).uniform(1, 10, (40, 40, 20)) for k, name in enumerate(("LPET", "SPET", "MR"))}
view = explore(volumes)
view
"""
FULL_SIZE = """
import sys
sys.path.append({folder!r})
from course import volumes
from mfdiff_lite.look import explore
explore(volumes(128))
"""
BREAK = "page.panes = lambda volumes, state: 1 / 0"
FREEZE = """
def frozen(volumes, state, live=page.panes, first=page.panes(view._case.volumes, view.state)["MR"]):
    return live(volumes, state) | {"MR": first}
page.panes = frozen
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no browser test: Playwright is missing; install it: pip install playwright"
    )
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no browser test: Chromium is missing; install it (Debian, Ubuntu: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """A JupyterLab with private folders and copies of the notebooks: (its address, its token, the notebooks)."""
    folder = tmp_path_factory.mktemp("lab")
    notebooks = folder / "root" / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*.html"))
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    private = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython",
    }  # fmt: skip
    environment = os.environ | {name: str(folder / sub) for name, sub in private.items()}
    environment |= {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    environment.pop("MPLBACKEND", None)  # figures go into the notebook
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--LabApp.expose_app_in_browser=True",
    ]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks.parent}"]
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait(
            lambda: server.poll() is not None or answers(f"{address}/api?token={token}"),
            3 * PATIENCE,
            "JupyterLab did not start",
        )
        assert server.poll() is None, f"JupyterLab did not start:\n{log.read_text()[-3000:]}"
        yield address, token, notebooks
    finally:
        server.terminate()  # it ends its kernels before itself
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def wait(condition, seconds, what):
    """Poll until `condition()`; `what`, text or a function that makes it, is the complaint."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(what() if callable(what) else what)
        time.sleep(0.05)


class Notebook:
    """A page of JupyterLab with one notebook, all of its cells run."""

    def __init__(self, page, lab, name):
        address, token, _ = lab
        self.page, self.errors, self.outside = page, [], set()
        page.set_default_timeout(3 * PATIENCE * 1000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        # A widget without a view is no error of the page, only a line in its console.
        page.on("console", lambda line: line.type == "error" and "view" in line.text and self.errors.append(line.text))
        page.on("request", lambda request: self._note(request.url, address))
        page.on("websocket", lambda socket: self._note(socket.url.replace("ws", "http", 1), address))
        page.goto(f"{address}/lab/tree/notebooks/{name}?token={token}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        context = "window.jupyterapp?.shell.currentWidget?.sessionContext"
        page.wait_for_function(f"() => {context}?.session?.kernel?.connectionStatus === 'connected'")
        page.set_default_timeout(PATIENCE * 1000)

    def _note(self, url, address):
        if url.startswith("http") and not url.startswith(address):
            self.outside.add(url)

    def run_all(self):
        """Fails for a cell that raised or did not run; read from the model, as the page shows errors in many ways."""
        done = self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        model = self.page.evaluate("() => window.jupyterapp.shell.currentWidget.model.toJSON()")
        for cell in model["cells"]:
            source = "".join(cell["source"]).strip()
            if cell["cell_type"] == "code" and source:
                raised = [f"{o['ename']}: {o['evalue']}" for o in cell["outputs"] if o["output_type"] == "error"]
                assert not raised, f"cell '{source.splitlines()[0]}' raised {raised[0]}"
                assert cell["execution_count"], f"cell '{source.splitlines()[0]}' did not run"
        assert done, "run-all-cells returned false"

    def theme(self, name):
        """JupyterLab's theme: Light or Dark."""
        change = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
        self.page.evaluate(change, f"JupyterLab {name}")
        self.page.wait_for_selector("#jupyterlab-splash", state="detached")

    def kernel(self, code):
        """Run code in the notebook's kernel and return what it prints."""
        script = """async (code) => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const future = kernel.requestExecute({code, store_history: false});
            let text = '', error = null;
            future.onIOPub = message => {
                if (message.header.msg_type === 'stream') text += message.content.text;
                if (message.header.msg_type === 'error') error = message.content.ename + ': ' + message.content.evalue;
            };
            await future.done;
            if (error) throw new Error(error);
            return text;
        }"""
        return self.page.evaluate(script, code)

    def explorer(self, number=0):
        return Explorer(self.page.locator(".jp-OutputArea-output", has=self.page.locator(".mfdiff-slices")).nth(number))

    def check_page(self):
        assert not self.errors, f"errors of the page: {self.errors[:3]}"
        assert not self.outside, f"the page asked for {sorted(self.outside)[:5]}"


class Explorer:
    """A slice explorer on the page."""

    def __init__(self, output):
        self.output = output
        output.locator("img.mfdiff-slices").last.wait_for(state="visible")
        output.scroll_into_view_if_needed()
        self.handles = {}

    def panes(self):
        """Name -> pixels as they were sent, (H, W, 3)."""
        read = """images => images.map(async image => {
            for (let left = 100; ; left--) {  // a new picture may come while the old one is read
                try { await image.decode(); break; } catch (error) { if (!left) throw error; }
                await new Promise(resolve => setTimeout(resolve, 20));
            }
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext('2d').drawImage(image, 0, 0);
            return canvas.toDataURL('image/png');
        })"""
        pictures = self.output.locator("img.mfdiff-slices").evaluate_all(f"images => Promise.all(({read})(images))")
        names, found = self.output.locator("b").all_inner_texts(), {}
        columns = -(-len(names) // len(pictures))
        for row, picture in enumerate(pictures):
            shown = np.asarray(Image.open(urllib.request.urlopen(picture)).convert("RGB"))
            inside = names[row * columns : (row + 1) * columns]
            width = (shown.shape[1] + GAP) // len(inside)
            found |= {name: shown[:, k * width : (k + 1) * width - GAP] for k, name in enumerate(inside)}
        return found

    def screen(self):
        """What the eye sees of the pictures, all bytes in one row."""
        shots = [image.screenshot(animations="disabled") for image in self.output.locator("img.mfdiff-slices").all()]
        seen = [np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"), np.int16).ravel() for shot in shots]
        return np.concatenate(seen)

    def caption(self):
        return self.output.locator("[role=status]").inner_text()

    def handle(self, label, which=0):
        box = self.output.locator(".widget-inline-hbox", has=self.output.page.get_by_text(label, exact=False)).first
        return box.locator(".noUi-handle").nth(which)

    def press(self, key, label="axial slice", seconds=PATIENCE, unchanged=()):
        """Press a key on a slider; slider, screen and every pane (but those named) must follow. Returns the slider's
        new value."""
        handle = self.handle(label)
        handle.focus()
        value, panes, screen = handle.get_attribute("aria-valuenow"), self.panes(), self.screen()
        self.output.page.keyboard.press(key)
        wait(lambda: handle.get_attribute("aria-valuenow") != value, seconds, f"{key}: '{label}' stays at {value}")

        def still():
            now = self.panes()
            return [name for name in panes if np.array_equal(now[name], panes[name]) and name not in unchanged]

        wait(lambda: not still(), seconds, lambda: f"{key} on '{label}': no new picture in {', '.join(still())}")
        wait(
            lambda: np.abs(self.screen() - screen).mean() > 0.2,
            seconds,
            f"{key} on '{label}': the screen stays the same",
        )
        now = self.panes()
        for name in unchanged:
            assert np.array_equal(now[name], panes[name]), f"{key} on '{label}': {name} has changed"
        return float(handle.get_attribute("aria-valuenow"))

    def check_same_slice(self, notebook, expression):
        """Every pane must show what a new explorer, set to the slice of the caption, would show in it."""
        plane, number = re.match(r"(\w+) slice (\d+) of", self.caption()).groups()
        code = f"""
import base64, json
_new = {expression}
_new.plane.value = {plane!r}
_new.slice.value = {number}
print(json.dumps([base64.b64encode(row.children[1].value).decode() for row in _new._rows]))
"""
        shown = self.panes()
        names = list(shown)
        for picture in json.loads(notebook.kernel(code)):
            expected = np.asarray(Image.open(urllib.request.urlopen(f"data:image/png;base64,{picture}")))
            while expected.shape[1] > 0:
                width = shown[names[0]].shape[1]
                assert np.array_equal(shown[names[0]], expected[:, :width]), f"{names[0]} shows another slice"
                names, expected = names[1:], expected[:, width + GAP :]
        assert not names


@pytest.fixture
def open_notebook(browser, lab, request):
    opened = []

    def opening(name, source=None):
        if source:
            _, _, folder = lab
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(notebook, folder / name)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        opened.append(Notebook(page, lab, name))
        return opened[-1]

    yield opening
    SHOTS.mkdir(parents=True, exist_ok=True)
    for notebook in opened:
        notebook.page.set_viewport_size({"width": 1280, "height": 3000})
        for theme in ("Light", "Dark"):  # for people to look at
            notebook.theme(theme)
            notebook.page.screenshot(path=SHOTS / f"{request.node.name}-{theme.lower()}.png")
        with contextlib.suppress(Exception):  # the server ends what is left
            notebook.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        notebook.page.close()


def test_quickstart(open_notebook):
    notebook = open_notebook("00_quickstart.ipynb")
    notebook.run_all()
    view = notebook.explorer()
    assert list(view.panes()) == ["LPET", "SPET", "MR", "restored", "restored - SPET", "SD", "gate"]
    for key in ("ArrowRight", "PageDown", "End", "Home"):
        number = view.press(key)
        assert view.caption().startswith(f"axial slice {number:g} of")
        view.check_same_slice(notebook, "mf.explore(scan, restored)")
    assert number == 1
    notebook.check_page()


def test_tour_of_the_explorer(open_notebook):
    notebook = open_notebook("09_explorer.ipynb")
    notebook.run_all()
    notebook.theme("Dark")
    view = notebook.explorer(1)
    notebook.kernel("view.slice.value = 4")
    wait(lambda: view.handle("axial slice").get_attribute("aria-valuenow") == "4.0", PATIENCE, "the slider lags")
    for key in ("ArrowLeft", "ArrowRight"):
        view.press(key)
        view.check_same_slice(notebook, "mf.explore(scan, restored); _new.go_to(view.position)")

    # The crosshair's values, as the page says them, are those of the arrays.
    said = dict(re.findall(r"(\w+) (-?[\d.e+-]+) \[", view.caption()))
    held = json.loads(notebook.kernel("print(json.dumps([value_at(v, view.position) for v in (scan.lpet, scan.mr)]))"))
    assert [said["LPET"], said["MR"]] == [f"{value:.4g}" for value in held]

    others = ("MR", "restored - SPET", "SD", "gate")
    view.press("ArrowRight", "Window", unchanged=others)  # the window is of the PET panes alone
    view.press("PageUp", "MR under PET", unchanged=others)
    button = view.output.get_by_role("button", name="coronal")
    button.focus()
    notebook.page.keyboard.press("Enter")
    wait(lambda: view.caption().startswith("coronal slice"), PATIENCE, "Enter on 'coronal' does not turn the plane")
    view.press("Home", "coronal slice")  # (a step to the next slice may stay inside a voxel of the gate)

    three = notebook.explorer(0)
    three.press("Home")
    three.output.locator(".widget-play button").first.click()  # the axial plane's; the others are not displayed
    wait(lambda: re.match(r"axial slice (\d+) of \1,", three.caption()), PATIENCE, "it does not play to the last slice")
    three.check_same_slice(notebook, "mf.explore(scan)")

    for part in ("b", "[role=status]"):
        assert contrast(three.output.locator(part).first) > 4.5, "not legible in the dark theme"
    notebook.check_page()


def test_assignment(open_notebook):
    notebook = open_notebook("assignments/02_gate.ipynb")  # with its solution, so that every cell runs
    notebook.run_all()
    notebook.check_page()


def contrast(locator):
    """WCAG contrast of an element's text with what it stands on."""
    colours = locator.evaluate("""element => {
        let below = element;
        while (getComputedStyle(below).backgroundColor === 'rgba(0, 0, 0, 0)') below = below.parentElement;
        return [getComputedStyle(element).color, getComputedStyle(below).backgroundColor];
    }""")
    values = [np.array([float(v) for v in re.findall(r"[\d.]+", colour)[:3]]) / 255 for colour in colours]
    linear = [np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) for v in values]
    low, high = sorted(float(v @ [0.2126, 0.7152, 0.0722]) for v in linear)
    return (high + 0.05) / (low + 0.05)


def test_every_key_brings_a_picture_and_how_long_it_takes_is_written_down(open_notebook):
    """Four volumes of 128^3. The milliseconds go to speed.json, for `make course-targets`; here only pictures count."""
    notebook = open_notebook("speed.ipynb", FULL_SIZE.format(folder=str(ROOT / "benchmarks")))
    notebook.run_all()
    view = notebook.explorer()
    view.press("ArrowRight")  # the first picture takes longer
    handle = view.handle("axial slice")
    spent = [
        handle.evaluate("""(handle, key) => new Promise(done => {
            const image = handle.closest('.jp-OutputArea-output').querySelector('img.mfdiff-slices');
            const began = performance.now();
            const shown = () => requestAnimationFrame(() => done(performance.now() - began));
            image.addEventListener('load', shown, {once: true});
            handle.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
        })""", key)
        for key in ["ArrowRight", "ArrowLeft"] * 15
    ]  # fmt: skip
    SHOTS.mkdir(parents=True, exist_ok=True)
    (SHOTS / "speed.json").write_text(json.dumps({"key_to_pixels_ms": float(np.median(spent)), "keys": len(spent)}))
    assert len(spent) == 30 and min(spent) > 0
    notebook.check_page()


def test_the_checks_notice_what_is_broken(open_notebook):
    notebook = open_notebook("toy.ipynb", TOY)
    notebook.run_all()
    view = notebook.explorer()
    view.press("ArrowRight")
    view.check_same_slice(notebook, "explore(volumes)")

    notebook.kernel("live = page.panes\n" + FREEZE)
    with pytest.raises(AssertionError, match="ArrowRight on 'axial slice': no new picture in MR$"):
        view.press("ArrowRight", seconds=3)
    notebook.kernel("page.panes = live")
    with pytest.raises(AssertionError, match="MR shows another slice"):
        view.check_same_slice(notebook, "explore(volumes)")
    view.press("ArrowRight")

    notebook.kernel(BREAK)
    with pytest.raises(AssertionError, match="no new picture in LPET, SPET, MR"):
        view.press("ArrowRight", seconds=3)
    assert "ZeroDivisionError" in view.output.get_by_role("alert").inner_text()  # and the reader sees why

    notebook.page.evaluate("() => fetch('http://192.0.2.1/x').catch(() => 0)")
    with pytest.raises(AssertionError, match=r"the page asked for \['http://192.0.2.1/x'\]"):
        notebook.check_page()


def test_a_cell_that_raises_is_noticed(open_notebook):
    with pytest.raises(AssertionError, match="cell '1 / 0' raised ZeroDivisionError: division by zero"):
        open_notebook("raises.ipynb", "1 / 0").run_all()

"""What holds for every test: one thread, no network, a cache folder of its own."""

import os

# Before torch is imported, and inherited by every process that a test starts: `make test` runs two workers on two
# cores, and a second thread in each makes both slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"  # diffusers and accelerate are used as libraries only

import shutil
import tempfile
from pathlib import Path

import no_network
import pytest

no_network.install()

TESTS = Path(__file__).resolve().parent


def pytest_configure(config):
    # Workers of pytest-xdist start after this and inherit it, so that a simulated cohort is made once for all of them.
    if not hasattr(config, "workerinput"):
        folder = Path(tempfile.mkdtemp(prefix="mfdiff_tests_"))
        config.stash[_FOLDER] = folder
        os.environ["MFDIFF_CACHE"] = str(folder / "cache")
        # Python imports sitecustomize when it starts: this puts the guard into child processes, kernels included.
        site = folder / "site"
        site.mkdir()
        code = f"import sys\nsys.path.append({str(TESTS)!r})\nimport no_network\nno_network.install()\n"
        (site / "sitecustomize.py").write_text(code + "sys.path.pop()\n", encoding="utf-8")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    import torch

    torch.set_num_threads(1)


def pytest_unconfigure(config):
    if folder := config.stash.get(_FOLDER, None):
        shutil.rmtree(folder, ignore_errors=True)


_FOLDER = pytest.StashKey[Path]()


@pytest.fixture(autouse=True)
def refuse_network():
    """Fail a test that tried to leave the machine even if the code under test caught the refusal."""
    no_network.attempts.clear()
    yield
    if no_network.attempts:
        pytest.fail(f"the test tried to use the network: {'; '.join(no_network.attempts)}", pytrace=False)

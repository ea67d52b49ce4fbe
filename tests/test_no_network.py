"""The suite works without a network, and would notice if it did not."""

import ast
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import no_network
import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "192.0.2.1"  # reserved for documentation (RFC 5737), leads nowhere
OPENS_SOCKETS = {"socket", "ssl", "urllib", "urllib3", "http", "ftplib", "requests", "httpx", "aiohttp", "pooch"}


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: socket.create_connection((OUTSIDE, 80), timeout=1),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect_ex((OUTSIDE, 80)),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (OUTSIDE, 53)),
        lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect(("2001:db8::1", 80)),
        lambda: socket.getaddrinfo("example.org", 80),
        lambda: socket.getaddrinfo(host="example.org", port=80),
        lambda: socket.gethostbyname("example.org"),
    ],
    ids=["create_connection", "connect_ex", "sendto", "ipv6", "getaddrinfo", "getaddrinfo-by-name", "gethostbyname"],
)
def test_guard_refuses_the_outside(attempt):
    with pytest.raises(no_network.NetworkRefused, match="must not use the network"):
        attempt()
    assert len(no_network.attempts) == 1
    no_network.attempts.clear()  # this one was wanted


def test_guard_lets_loopback_through():
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = threading.Thread(target=lambda: server.accept()[0].sendall(b"hello"))
        answer.start()
        with socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client:
            assert client.recv(5) == b"hello"
        answer.join()


def test_guard_is_in_child_processes():
    code = f"import socket; socket.create_connection(('{OUTSIDE}', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "NetworkRefused" in done.stderr


def test_swallowed_refusal_still_fails_the_test(tmp_path):
    """Negative control: a test whose code hides the refusal must not pass."""
    for name in ("conftest.py", "no_network.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import contextlib, socket\n"
        "def test_it():\n"
        "    with contextlib.suppress(Exception):\n"
        f"        socket.create_connection(('{OUTSIDE}', 80), timeout=1)\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "tried to use the network" in done.stdout


def test_library_source_opens_no_sockets():
    sources = sorted((ROOT / "mfdiff_lite").rglob("*.py"))
    assert sources
    found = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found += [f"{path.name}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in OPENS_SOCKETS]
    assert not found, f"only data/download.py may open connections: {found}"


def test_import_and_embedded_anatomies_need_no_network():
    """In a process of its own, so that nothing imported by other tests counts."""
    code = (
        "import no_network, mfdiff_lite as mf\n"
        "names = mf.list_anatomies()\n"
        "assert 'icbm152' in names, names\n"
        "[mf.load_anatomy(n) for n in names if n == 'icbm152' or n.startswith('ahba')]\n"
        "assert not no_network.attempts, no_network.attempts\n"
        "print(len(names))\n"
    )
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT / "tests")])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 7  # ICBM152 and six individuals

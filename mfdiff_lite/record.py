"""What an image was made from, as JSON beside it: files and their SHA-256, weights, findings, settings, code.

Field names follow BIDS for derived data where it has one (`Description`, `Sources`, `Units`, `GeneratedBy`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .checks import Finding
from .files import whole_file
from .revision import code_revision


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, or of all files of a folder one after the other by name."""
    path, digest = Path(path).expanduser(), hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def record_path(image: Path) -> Path:
    """Where the record of an image lies: out.nii.gz -> out.json."""
    return image.with_name(image.name.removesuffix(".gz").removesuffix(".nii") + ".json")


def write_record(
    image: Path,
    description: str,
    sources: Mapping[str, Path | None],
    findings: Iterable[Finding],
    details: Mapping[str, Any],
    version: str,
    command: list[str],
    force: bool = False,
) -> Path:
    """Write the record of an image, whole or not at all. sources: role -> input; details: unit, settings, weights."""
    content = {
        "Description": description,
        "GeneratedBy": [{"Name": "mfdiff_lite", "Version": version, "Revision": code_revision()}],
        "Date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "Command": command,
        "Image": {"file": image.name, "sha256": sha256(image)},
        "Sources": {
            role: {"file": str(path), "sha256": sha256(path)} for role, path in sources.items() if path is not None
        },
        "Checks": [asdict(one) for one in findings],
        **details,
    }
    with whole_file(record_path(image), force) as partial:
        partial.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return record_path(image)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Many cases: what a table or a folder says is to be restored."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """One scan to restore. name: of its result; dose_reduction: None where it is not given."""

    name: str
    lpet: Path
    mr: Path | None = None
    dose_reduction: float | None = None


def find_cases(where: Path) -> list[Case]:
    """The cases of a CSV table (columns lpet and, as known, mr, dose_reduction, name; paths are relative to the table)
    or of a folder: every lpet.nii.gz with its mr.nii.gz beside it, as `simulate` writes them, or in BIDS every
    *_pet.nii.gz with its subject's first *_T1w.nii.gz. In order of their names. Raises OSError if there is no such
    place, ValueError for a table that cannot be read so, no case, or two of one name."""
    if where.is_dir():
        cases = _simulated(where) or _bids(where)
    elif where.is_file():
        cases = [_row(where, number, row) for number, row in enumerate(_rows(where), start=2)]
    else:
        raise OSError(f"{where}: expected a folder or a CSV table of cases, found nothing; check the path")
    if not cases:
        raise ValueError(
            f"{where}: expected lpet.nii.gz or sub-*/**/pet/*_pet.nii.gz, or a table with rows, found no case"
        )
    names = sorted(case.name for case in cases)
    twice = [one for one, following in zip(names, names[1:], strict=False) if one == following]
    if twice:
        raise ValueError(
            f"{where}: expected a name for each case, found {twice[0]} twice; give the table a column name"
        )
    return sorted(cases)


def _simulated(folder: Path) -> list[Case]:
    return [
        Case(
            "_".join(path.parent.relative_to(folder).parts) or folder.resolve().name,
            path,
            _if_there(path.parent / "mr.nii.gz"),
        )
        for path in folder.rglob("lpet.nii.gz")
    ]


def _bids(folder: Path) -> list[Case]:
    cases = []
    for pet in folder.glob("sub-*/**/pet/*_pet.nii*"):
        subject = folder / pet.relative_to(folder).parts[0]
        anatomy = [*sorted(pet.parent.parent.glob("anat/*_T1w.nii*")), *sorted(subject.glob("**/anat/*_T1w.nii*"))]
        cases.append(Case(pet.name.partition(".nii")[0], pet, anatomy[0] if anatomy else None))
    return cases


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    except (UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise ValueError(f"{table}: expected a CSV table in UTF-8, found something else ({error})") from None
    if "lpet" not in (reader.fieldnames or []):
        raise ValueError(f"{table}: expected a column lpet, found {', '.join(reader.fieldnames or []) or 'none'}")
    return rows


def _row(table: Path, number: int, row: dict[str, str]) -> Case:
    if not row["lpet"]:
        raise ValueError(f"{table}, line {number}: expected a path in the column lpet, found none")
    lpet = table.parent / row["lpet"]
    name = row.get("name") or lpet.name.partition(".nii")[0]
    if Path(name).name != name:
        raise ValueError(f"{table}, line {number}: expected a name without folders, found {name!r}")
    try:
        dose = float(row["dose_reduction"]) if row.get("dose_reduction") else None
    except ValueError:
        raise ValueError(
            f"{table}, line {number}: expected a number, found dose_reduction {row['dose_reduction']!r}"
        ) from None
    return Case(name, lpet, table.parent / row["mr"] if row.get("mr") else None, dose)


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None

"""Which files a dataset is: a path, a directory, a pattern or a URL becomes a list of names.

Does not look into data files.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayreward import storage
from rayreward.errors import DataError
from rayreward.formats import EXTENSIONS, format_of


def find_files(dataset: str) -> list[str]:
    """The files of a dataset, by their names (absolute paths, or URLs without secrets), sorted.

    Raises:
        DataError: There are none, or their storage can't be reached.
    """
    dataset = storage.plain(dataset)
    if storage.is_url(dataset):
        return _remote_files(dataset)
    path = Path(dataset).expanduser()
    if path.is_file():
        return [_absolute(path)]
    if path.is_dir():
        return _files_in(path)
    matches = map(Path, glob.glob(str(path), recursive=True))
    files = sorted({_absolute(match) for match in matches if match.is_file()})
    if not files:
        raise DataError(
            f"Dataset {dataset!r}: no such file or directory, and no file matches it as a "
            "pattern. Check the path; inside a Ray job, relative paths start at its working "
            "directory."
        )
    return files


def _files_in(directory: Path) -> list[str]:
    if (directory / "dataset_dict.json").exists():
        splits = _noted(directory / "dataset_dict.json", lambda note: note["splits"])
        raise DataError(
            f"Dataset {str(directory)!r} holds several splits ({', '.join(splits)}). Pass one of "
            f"them, such as {str(directory / next(iter(splits), 'train'))!r}."
        )
    if (directory / "state.json").exists() and (directory / "dataset_info.json").exists():
        found = _noted(
            directory / "state.json",
            lambda note: [_absolute(directory / item["filename"]) for item in note["_data_files"]],
        )
    else:
        found = sorted(
            _absolute(path)
            for path in directory.rglob("*")
            if path.is_file() and not _hidden(path.relative_to(directory)) and format_of(path.name)
        )
    if not found:
        raise DataError(
            f"Dataset {str(directory)!r} holds no data files. Files ending in "
            f"{', '.join(EXTENSIONS)} are read."
        )
    return found


def _remote_files(dataset: str) -> list[str]:
    """As for local paths, in an object store; of http(s) a single file."""
    try:
        place = storage.objects_of(dataset)
        if place.exists(dataset):
            return [dataset]
        below = place.files_below(dataset)
        if {"state.json", "dataset_info.json"} <= set(below):
            note = json.loads(place.read(f"{dataset}/state.json"))
            return [f"{dataset}/{item['filename']}" for item in note["_data_files"]]
        found = [path for path in below if not _hidden(Path(path)) and format_of(path)]
        files = [f"{dataset}/{path}" for path in found] or place.glob(dataset)
    except OSError as error:
        raise DataError(f"Dataset {dataset!r} can't be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise _not_saved(f"{dataset}/state.json", error) from error
    if "dataset_dict.json" in below:
        raise DataError(f"Dataset {dataset!r} holds several splits. Pass one of its directories.")
    if not files:
        raise DataError(
            f"Dataset {dataset!r}: no data files are there, and none matches it as a pattern. "
            f"Files ending in {', '.join(EXTENSIONS)} are read; of http(s):// single files only."
        )
    return files


def _noted(path: Path, pick: Callable[[Any], list[str]]) -> list[str]:
    """What `save_to_disk` noted beside its files."""
    try:
        return pick(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _not_saved(str(path), error) from error


def _not_saved(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path} is not what Hugging Face's save_to_disk writes ({error!r}). Save the dataset "
        "again, or pass its data files."
    )


def _absolute(path: Path) -> str:
    """The path from the root. A link to a file keeps its own name, since that tells the format:
    the hub's cache links names such as `train.parquet` to files named by their hash.
    """
    return str(path.parent.resolve() / path.name)


def _hidden(path: Path) -> bool:
    return any(part.startswith(("_", ".")) for part in path.parts)

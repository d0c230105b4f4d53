"""Where files lie: on a disk, in an object store, behind a URL.

A *name* is the absolute path of a local file, or a URL less everything that says how to reach it
rather than what it is: user names, keys and the whole query. Names are all that the rest of the
package sees, and so all that plans, manifests and messages can show; what was taken off stays in
this process, under `access`, for those who open the name. The only module that knows pyarrow.fs
and fsspec.

Failures away from this machine are OSErrors with a number (without one, pyarrow's are taken for
damaged files) whose `strerror` says what happened and what to do.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from rayreward.storage.base import Stat, Storage
from rayreward.storage.connecting import connect
from rayreward.storage.disk import Disk
from rayreward.storage.failures import told
from rayreward.storage.objects import Objects
from rayreward.storage.urls import (
    access,
    access_to,
    is_url,
    lies_in,
    locate,
    parse,
    plain,
    take_access,
)

__all__ = [
    "READ_ONLY",
    "Disk",
    "Objects",
    "Stat",
    "Storage",
    "access",
    "is_url",
    "lies_in",
    "locate",
    "mapped",
    "objects_of",
    "plain",
    "source",
    "storage_of",
    "take_access",
]

READ_ONLY = ("http", "https", "hf")
"""Schemes that no output is written to."""

_DISK = Disk()


def storage_of(name: str) -> Disk | Objects:
    """The storage in which a name lies.

    Raises:
        OSError: There is none for its scheme, or it can't be reached.
    """
    if not is_url(name):
        return _DISK
    url = parse(name)
    try:
        return connect(url.scheme, url.bucket, *access_to(name))
    except Exception as error:
        raise told(error, name) from None


def objects_of(name: str) -> Objects:
    """The storage in which a URL lies.

    Raises:
        OSError: As in `storage_of`.
    """
    storage = storage_of(name)
    assert isinstance(storage, Objects), f"{name} is a path"
    return storage


def source(name: str) -> Any:
    """What pyarrow reads a file from: its path, or an open file that is read range by range.

    Raises:
        OSError: It can't be opened.
    """
    storage = storage_of(name)
    return pa.PythonFile(storage.ranges(name), "r") if isinstance(storage, Objects) else name


def mapped(name: str) -> pa.NativeFile:
    """Opens a file as mapped memory where it lies on a disk, and to be read by ranges elsewhere.

    Raises:
        OSError: It can't be opened.
    """
    storage = storage_of(name)
    if isinstance(storage, Objects):
        return pa.PythonFile(storage.open(name), "r")
    return pa.memory_map(name)

"""URLs, and names: what is left of them without all that says how to reach a place.

What was taken off stays in this process, for those who open the name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

STORES = ("s3", "gs")
"""Schemes whose URLs begin with a bucket."""

_ALIASES = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}
_USER = re.compile(r"([^/@]*)@")
_USER_OF_STORE = re.compile(r"([^/@:]*:[^@]*|[^/@]*)@")
"""A bucket has no port, so what comes before an @ is a key, though it may have slashes in it."""

_QUERY = re.compile(r"\?(?=[\w.-]+=)")
"""Elsewhere than on the web a question mark may also stand in a pattern."""

_ACCESS: dict[str, tuple[str, str]] = {}
"""User part and query of URLs by the name, file or directory, that they were given for."""


@dataclass(frozen=True, slots=True)
class Url:
    """A URL, taken apart.

    Attributes:
        scheme: In small letters.
        user: What stood before an @, which may be a key and its secret.
        place: Host or bucket and path, without a slash at the end.
        query: What stood after the question mark.
    """

    scheme: str
    user: str
    place: str
    query: str

    @property
    def name(self) -> str:
        """What it is, without how to reach it."""
        return f"{self.scheme}://{self.place}"

    @property
    def bucket(self) -> str:
        """The place's first part."""
        return self.place.partition("/")[0]


def parse(url: str) -> Url:
    """Takes a URL or a name apart. Escapes in paths are left alone: a key is its own name."""
    given, _, rest = url.partition("://")
    scheme = _ALIASES.get(given.lower(), given.lower())
    if scheme in ("http", "https"):
        rest, _, query = rest.partition("#")[0].partition("?")
    else:
        rest, query = [*_QUERY.split(rest, maxsplit=1), ""][:2]
    user = (_USER_OF_STORE if scheme in STORES else _USER).match(rest)
    place = rest[user.end() :] if user else rest
    return Url(scheme, user[1] if user else "", place.rstrip("/"), query)


def is_url(text: str) -> bool:
    """Whether this names something that is not on a disk."""
    return "://" in text


def plain(text: str) -> str:
    """The name of a path or URL as a user gives it; what else is in the URL is remembered.

    `file://` is a path like any other. Paths stay as they are, relative or not.
    """
    if text.startswith("file://"):
        return unquote(text.removeprefix("file://"))
    if not is_url(text):
        return text
    url = parse(text)
    if url.user or url.query:
        _ACCESS[base_of(url.name)] = (url.user, url.query)
    return url.name


def locate(text: str) -> Path | str:
    """The absolute name of a path or URL: a path on a disk, a string elsewhere."""
    name = plain(text)
    return parse(name).name if is_url(name) else Path(name).expanduser().resolve()


def lies_in(name: str, directory: str) -> bool:
    """Whether a name is another's, or lies below it. Both are absolute."""
    return name == directory or name.startswith(directory.rstrip("/") + "/")


def base_of(pattern: str) -> str:
    """The directory below which a pattern's matches lie; the name itself if it is no pattern."""
    start = pattern.index("://") + 3
    wild = re.search(r"[*?\[]", pattern[start:])
    return pattern if wild is None else pattern[: start + wild.start()].rpartition("/")[0]


def access(*names: str) -> dict[str, tuple[str, str]]:
    """How to reach these names and what is below, for another process to `take_access`.

    Holds secrets: not to be written or shown.
    """
    bases = [base_of(name) for name in names if is_url(name)]
    return {key: _ACCESS[key] for key in list(_ACCESS) if any(lies_in(base, key) for base in bases)}


def take_access(others: Mapping[str, tuple[str, str]]) -> None:
    """Reaches names as another process does."""
    _ACCESS.update(others)


def access_to(name: str) -> tuple[str, str]:
    """The user part and the query with which a name, or a directory around it, was given."""
    known = [key for key in list(_ACCESS) if lies_in(name, key)]  # another thread may add to it
    return _ACCESS[max(known, key=len)] if known else ("", "")


def reached(name: str) -> str:
    """The URL that a name was taken from."""
    url, (user, query) = parse(name), access_to(name)
    return f"{url.scheme}://{user and user + '@'}{url.place}{query and '?' + query}"

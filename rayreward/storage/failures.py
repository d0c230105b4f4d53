"""What went wrong away from this machine, in words that show no secrets."""

from __future__ import annotations

import errno
import re

from rayreward.storage.urls import parse

_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")

_CREDENTIALS = {
    "s3": "Credentials come from the environment (AWS_ACCESS_KEY_ID …), ~/.aws or the machine's "
    "role",
    "gs": "Credentials come from GOOGLE_APPLICATION_CREDENTIALS or the machine's account",
    "hf": "A token comes from HF_TOKEN or `hf auth login`",
}

_DENIED = re.compile(
    r"ACCESS_DENIED|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ACCESS_KEY_ID|"
    r"SIGNATURE|EXPIRED|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION"
)
_THROTTLED = re.compile(r"SLOW_?DOWN|THROTTL|SERVICE_UNAVAILABLE|HTTP status (429|503)")
_UNREACHABLE = re.compile(
    r"NETWORK_CONNECTION|REQUEST_TIMEOUT|curlCode|UNAVAILABLE|[Oo]ffline|[Cc]annot connect|"
    r"resolve host"
)


def told(error: Exception, name: str) -> OSError:
    """A failure as an OSError with a number and a reason that shows no secrets."""
    error = _behind(error)
    scheme = parse(name).scheme
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    lines = reason.strip().splitlines() or [type(error).__name__]
    text = _URL_IN_TEXT.sub(lambda url: parse(url[0]).name, lines[0]).rstrip(".")
    status = _status(error)
    if "NO_SUCH_BUCKET" in text:
        return OSError(errno.ENOENT, no_bucket(name))
    if isinstance(error, FileNotFoundError) or "NO_SUCH_KEY" in text or status == 404:
        return OSError(errno.ENOENT, "there is no such file")
    if isinstance(error, PermissionError) or status in (401, 403) or _DENIED.search(text):
        hint = _CREDENTIALS.get(scheme, "Check the user and key that the URL was given with")
        return OSError(
            errno.EACCES, f"access is denied ({text}). {hint}, on every machine of the cluster"
        )
    if status in (429, 503) or _THROTTLED.search(text):
        return OSError(
            errno.EBUSY,
            f"the store asked to slow down, and went on asking ({text}). Use fewer actors, or come "
            "back later",
        )
    if passing(error) or _UNREACHABLE.search(text):
        return OSError(
            errno.EHOSTUNREACH,
            f"its endpoint can't be reached ({text}). Check the network and the endpoint"
            + (" (AWS_ENDPOINT_URL, or ?endpoint_override= in the URL)" if scheme == "s3" else ""),
        )
    number = error.errno if isinstance(error, OSError) else None
    return OSError(number or errno.EIO, text)


def no_bucket(name: str) -> str:
    """What to say where the bucket of a name is not there."""
    url = parse(name)
    return f"there is no bucket {url.bucket!r} at this endpoint. Check the URL's spelling" + (
        ", region and endpoint (AWS_ENDPOINT_URL)" if url.scheme == "s3" else ""
    )


def _status(error: Exception) -> int | None:
    """The HTTP status of an error of aiohttp, requests, httpx or huggingface_hub."""
    status = getattr(error, "status", None)
    if status is None:
        status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def passing(error: Exception) -> bool:
    """Whether it may go well the next time: throttled, or cut off."""
    error = _behind(error)
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    if "offline mode" in str(error):  # of the Hugging Face hub: nothing was tried
        return False
    return isinstance(error, ConnectionError | TimeoutError) or (
        type(error).__module__.startswith("aiohttp")
    )


def _behind(error: Exception) -> Exception:
    """What was the matter where fsspec says that a file is not there, whatever it was."""
    cause = error.__cause__
    missing = isinstance(error, FileNotFoundError)
    return cause if missing and isinstance(cause, Exception) else error

"""From a scheme to what speaks it: pyarrow's filesystems, or fsspec's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, unquote

import pyarrow.fs as pafs

from rayreward.storage.objects import Objects
from rayreward.storage.retry import Retry, once

_S3_ATTEMPTS = 6
"""Tries of a request to S3, where AWS_MAX_ATTEMPTS does not say: about 15 s of waiting in all."""

_GCS_RETRY_S = 60


@lru_cache(maxsize=64)
def connect(scheme: str, bucket: str, user: str, query: str) -> Objects:
    """The storage that a scheme stands for, kept open for the next who asks for it.

    Args:
        scheme: As URLs begin.
        bucket: What comes next in the URL.
        user: What stood before it.
        query: What stood at the end.

    Raises:
        OSError: There is none.
    """
    settings = dict(parse_qsl(query))
    if scheme == "s3":
        return Objects(scheme, _s3(bucket, user, settings), once)
    if scheme == "gs":
        return Objects(scheme, _gcs(user, settings), once)
    return Objects(scheme, pafs.PyFileSystem(pafs.FSSpecHandler(_fsspec(scheme))), Retry())


def _s3(bucket: str, user: str, settings: dict[str, str]) -> pafs.FileSystem:
    """S3, or what speaks like it. pyarrow retries by a strategy of AWS's own."""
    taken = _settings(
        settings,
        str,
        *("region", "scheme", "endpoint_override", "access_key", "secret_key", "session_token"),
        *("role_arn", "session_name", "external_id", "tls_ca_file_path"),
    )
    taken |= _settings(settings, _as_bool, "anonymous", "force_virtual_addressing")
    _refuse_the_rest(settings)
    if user:
        key, _, secret = user.partition(":")
        taken |= {"access_key": unquote(key), "secret_key": unquote(secret)}
    # pyarrow itself looks at these only where it is given a URL
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if environment and "endpoint_override" not in taken:
        taken["endpoint_override"] = environment
    if "endpoint_override" not in taken and "region" not in taken:
        taken["region"] = pafs.resolve_s3_region(bucket)
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", _S3_ATTEMPTS))
    return pafs.S3FileSystem(
        **taken,
        connect_timeout=10,
        request_timeout=60,
        allow_delayed_open=True,  # a small object is one request
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


def _gcs(user: str, settings: dict[str, str]) -> pafs.FileSystem:
    """Google Cloud Storage. pyarrow retries for as long as it is told."""
    taken = _settings(settings, str, "scheme", "endpoint_override", "project_id")
    limit = _settings(settings, float, "retry_limit_seconds").get(
        "retry_limit_seconds", _GCS_RETRY_S
    )
    anonymous = _settings(settings, _as_bool, "anonymous").get("anonymous", False)
    _refuse_the_rest(settings)
    return pafs.GcsFileSystem(
        **taken,
        anonymous=anonymous or user == "anonymous",
        retry_time_limit=timedelta(seconds=limit),
    )


def _fsspec(scheme: str) -> Any:
    import fsspec

    if scheme not in fsspec.available_protocols():
        raise OSError(
            errno.EPROTONOSUPPORT,
            f"{scheme}:// is no scheme that is known. s3://, gs://, hf://, http(s):// and what "
            "else fsspec has are; a path needs no scheme",
        )
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise OSError(
            errno.EPROTONOSUPPORT,
            f"{scheme}:// needs a package that is not installed ({error}). Install it on every "
            "machine of the cluster",
        ) from error


def _settings(given: dict[str, str], as_type: Callable[[str], Any], *names: str) -> dict[str, Any]:
    return {name: as_type(given.pop(name)) for name in names if name in given}


def _as_bool(text: str) -> bool:
    return text.lower() in ("1", "true", "yes")


def _refuse_the_rest(settings: dict[str, str]) -> None:
    if settings:
        raise OSError(
            errno.EINVAL,
            f"the URL sets {', '.join(settings)}, which is not known. endpoint_override, region, "
            "scheme and anonymous are the usual ones",
        )

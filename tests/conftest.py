"""Fixtures for all tests. Importing this imports neither torch nor Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`
# and for Ray's workers, which import a test's module to find a function that it sends them
os.environ["PYTHONPATH"] = str(Path(__file__).parent)

# Hundreds of processes start here: they find the package compiled, and no cluster starts idle ones.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_enable_worker_prestart", "0")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "5")  # Ray's looks for logs cost a core's 3 %

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")  # no such service to wait for
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several tests share the cores


@pytest.fixture(scope="session")
def examples() -> Path:
    """The project's example data."""
    return ROOT / "examples"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A headless Llama checkpoint, small enough to load in no time."""
    from tiny import make_checkpoint

    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """One S3 server for all tests, with faults to be told to; see `remote.S3`."""
    import remote

    with remote.s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The S3 server, and storage that knows of no URL yet."""
    from rayreward.storage import connecting, urls

    monkeypatch.setattr(urls, "_ACCESS", {})
    connecting.connect.cache_clear()
    s3_server.server.requests.clear()
    yield s3_server
    s3_server.server.faults.clear()
    connecting.connect.cache_clear()


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One local Ray cluster with 12 CPUs for all tests that take `ray_cluster`."""
    import ray

    ray.init(address="local", num_cpus=12, include_dashboard=False, configure_logging=False)
    yield ray
    ray.shutdown()

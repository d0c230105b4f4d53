"""cluster.yaml: Ray's own offline check, and what that check does not look into.

Ray's schema says nothing about ``node_config``, image tags or shell commands, and keys left out get
Ray's defaults (a dashboard on all interfaces, for one), so the tests read the config as Ray
completes it.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
TOKEN_FILE = "/home/ray/.ray/auth_token"
IMAGE = re.compile(
    r"rayproject/ray:(?P<ray>\d+\.\d+\.\d+)(?:\.[0-9a-f]{6,40})?-(?P<python>py3\d+)-"
    r"(?P<platform>cpu|gpu|cu\d+)(?:@sha256:[0-9a-f]{64})?"
)


def _raw() -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return config


def _prepared() -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(_raw())
    return config


def _head(config: dict[str, Any]) -> dict[str, Any]:
    head: dict[str, Any] = config["available_node_types"][config["head_node_type"]]
    return head


def _workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types: dict[str, dict[str, Any]] = dict(config["available_node_types"])
    del types[config["head_node_type"]]
    assert types, "cluster.yaml has no worker node type"
    return types


def _setup_commands(config: dict[str, Any]) -> list[list[str]]:
    """What each node type runs; a worker type's own list replaces the common one."""
    common = config["worker_setup_commands"]
    workers = [node.get("worker_setup_commands", common) for node in _workers(config).values()]
    return [config["head_setup_commands"], *workers]


def _ray_start(commands: list[str]) -> str:
    starts = [command for command in commands if re.search(r"\bray start\b", command)]
    assert len(starts) == 1, f"expected exactly one `ray start` in {commands}"
    return starts[0]


def _pinned_ray_version() -> str:
    path = ROOT / "constraints.txt"
    assert path.is_file(), "constraints.txt is missing: cluster.yaml installs the wheel with it"
    pins: list[str] = re.findall(r"(?m)^ray==([^\s;#\\]+)", path.read_text(encoding="utf-8"))
    assert len(pins) == 1, f"constraints.txt needs exactly one `ray==` pin, found {pins}"
    return pins[0]


def test_cluster_yaml_passes_ray_schema() -> None:
    validate_config(_prepared())


def test_cluster_yaml_typo_fails_ray_schema() -> None:
    config = _raw()
    config["max_wokers"] = config.pop("max_workers")
    with pytest.raises(Exception, match="'max_wokers' was unexpected"):
        validate_config(prepare_config(config))


def test_cluster_yaml_fractional_gpu_fails_ray_schema() -> None:
    config = _raw()
    for node in _workers(config).values():
        node["resources"]["GPU"] = 0.5
    with pytest.raises(Exception, match=r"0\.5 is not of type 'integer'"):
        validate_config(prepare_config(config))


def test_cluster_yaml_workers_scale_from_zero() -> None:
    config = _prepared()
    assert config["max_workers"] >= 1
    assert 0 < config["idle_timeout_minutes"] <= 60
    for name, node in _workers(config).items():
        assert node["min_workers"] == 0, name
        assert 1 <= node["max_workers"] <= config["max_workers"], name


def test_cluster_yaml_workers_are_spot_and_head_is_not() -> None:
    config = _prepared()
    for name, node in _workers(config).items():
        market = node["node_config"].get("InstanceMarketOptions", {})
        assert market.get("MarketType") == "spot", name
    assert "InstanceMarketOptions" not in _head(config)["node_config"]


def test_cluster_yaml_head_offers_no_cpu_and_no_gpu() -> None:
    # Both have to be spelled out: Ray fills in what is missing from the instance type.
    head = _head(_prepared())
    assert head["resources"].get("CPU") == 0
    assert head["resources"].get("GPU") == 0
    assert head["max_workers"] == 0


def test_cluster_yaml_workers_offer_gpus() -> None:
    for name, node in _workers(_prepared()).items():
        assert node["resources"].get("GPU", 0) >= 1, name


def test_cluster_yaml_images_are_pinned_to_the_constraints_ray_version() -> None:
    docker = _prepared()["docker"]
    # Ray's autoscaler reads `image` for every node, even one that has an image of its own.
    assert "image" in docker
    keys = ("image", "head_image", "worker_image")
    images = {key: docker[key] for key in keys if key in docker}
    matches = {key: IMAGE.fullmatch(image) for key, image in images.items()}
    assert all(matches.values()), f"not an exact Ray release: {images}"
    assert {match["ray"] for match in matches.values() if match} == {_pinned_ray_version()}
    assert len({match["python"] for match in matches.values() if match}) == 1, images
    worker = matches.get("worker_image", matches["image"])
    assert worker is not None
    assert worker["platform"] != "cpu", images


def test_cluster_yaml_installs_the_wheel_on_every_node() -> None:
    config = _prepared()
    remote = {local: path for path, local in config["file_mounts"].items()}
    assert {"dist", "constraints.txt"} <= remote.keys()
    install = (
        f"pip install --constraint {remote['constraints.txt']} {remote['dist']}/rayreward-*.whl"
    )
    for commands in _setup_commands(config):
        assert install in commands


def test_cluster_yaml_token_auth_is_on_for_every_node() -> None:
    config = _prepared()
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = _ray_start(config[key])
        assert re.search(r"\bRAY_AUTH_MODE=token\b.*\bray start\b", start), key
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_cluster_yaml_token_is_a_private_file_on_every_node() -> None:
    config = _prepared()
    assert config["file_mounts"].get(TOKEN_FILE) == "~/.ray/auth_token"
    for commands in _setup_commands(config):
        assert f"chmod 600 {TOKEN_FILE}" in commands
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert not re.search(r"\bRAY_AUTH_TOKEN\s*[=:]", text), "the token itself must not be in here"


def test_cluster_yaml_opens_nothing_to_the_world() -> None:
    config = _prepared()
    assert "--dashboard-host=127.0.0.1" in _ray_start(config["head_start_ray_commands"]).split()
    values = json.dumps(config)
    assert "0.0.0.0" not in values
    assert "::/0" not in values


def test_cluster_yaml_head_runs_the_autoscaler() -> None:
    start = _ray_start(_prepared()["head_start_ray_commands"])
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start.split()

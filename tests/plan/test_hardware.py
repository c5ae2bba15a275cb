"""The catalogue of devices, and clusters that name them."""

from __future__ import annotations

import re

import pytest
import yaml

from planner import read_cluster
from planner.hardware import (
    catalogue,
    device,
    filled,
    gpu_kind,
    hardware_notes,
    node_device,
    parse_catalogue,
)
from realflow.errors import InputError
from realflow.planfile import Cluster, Node
from realflow.planfile.kinds import RUNTIME_OF
from realflow.realloc.edges import topology

NAMES = ("a100-40gb", "a100-80gb", "a800", "h100", "h800", "h200", "b200", "l40s", "mi300x", "cpu")


def test_catalogue_has_the_devices_that_it_promises() -> None:
    known = catalogue().devices
    assert set(known) == set(NAMES) == set(RUNTIME_OF) - {"cuda"}
    assert re.fullmatch(r"[0-9a-f]{16}", catalogue().hash)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source_and_an_order_of_magnitude(name: str) -> None:
    known = device(name)
    numbers = {
        **{f"flops.{dtype}": value for dtype, value in known.flops.items()},
        "bandwidth": known.bandwidth,
        "launch": known.launch,
        "inside.speed": known.inside.bytes_per_second,
        "inside.latency": known.inside.latency,
        "between.speed": known.between.bytes_per_second,
        "between.latency": known.between.latency,
        "host.speed": known.host.bytes_per_second,
        "host.latency": known.host.latency,
        "achieved.flops": known.achieved_flops,
        "achieved.bandwidth": known.achieved_bandwidth,
        "ramp.flops": known.ramp_flops,
        "ramp.bytes": known.ramp_bytes,
    }
    assert {"bfloat16", "float32", "float64"} <= set(known.flops)
    for where, value in numbers.items():
        assert value > 0, where
        assert len(known.sources[where]) > 10, where
    assert known.flops["bfloat16"] >= known.flops["float32"] >= known.flops["float64"]
    assert known.inside.bytes_per_second >= known.between.bytes_per_second
    assert known.inside.bytes_per_second < known.bandwidth
    assert known.achieved_flops < 1 and known.achieved_bandwidth < 1
    assert (known.memory_bytes is None) == (name == "cpu")


def test_datasheet_relations() -> None:
    """What the sheets say of each other: control for slips of a digit."""
    h100, h200, h800 = device("h100"), device("h200"), device("h800")
    assert h100.flops["bfloat16"] == h200.flops["bfloat16"] == h800.flops["bfloat16"] == 989e12
    assert h100.bandwidth < h200.bandwidth and h800.inside.bytes_per_second < h100.inside.bytes_per_second
    assert h800.flops["float64"] == 1e12
    a100, a800 = device("a100-80gb"), device("a800")
    assert (a100.flops, a100.bandwidth) == (a800.flops, a800.bandwidth)
    assert a800.inside.bytes_per_second * 3 == a100.inside.bytes_per_second * 2
    assert device("b200").inside.bytes_per_second == 2 * h100.inside.bytes_per_second


def broken(change: object) -> str:
    from importlib.resources import files

    document = yaml.safe_load(files("planner").joinpath("catalogue.yaml").read_text())
    document["devices"]["h100"]["bandwidth"] = change
    return yaml.safe_dump(document)


@pytest.mark.parametrize(
    "change",
    [[0, "h100"], [-1.0, "h100"], [True, "h100"], [3.35e12, "nobody"], 3.35e12, [float("inf"), "h100"]],
)
def test_a_number_without_source_or_not_above_0_is_refused(change: object) -> None:
    with pytest.raises(InputError, match=r"devices\.h100\.bandwidth"):
        parse_catalogue(broken(change))
    parse_catalogue(broken([3.0e12, "h100"]))  # control


def test_unknown_device_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean h100"):
        device("h1000")


def test_a_cluster_names_devices_and_leaves_the_rest_to_the_catalogue(tmp_path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "nodes:\n  - {name: n1, devices: 8, kind: h100}\n"
        "  - {name: n2, devices: 8, kind: a100-40gb, memory: 39 GiB, inside: 100 GB/s, between: 200 Gb/s}\n"
    )
    first, second = read_cluster(path).nodes
    assert (first.memory_bytes, first.inside, first.between) == (80_000_000_000, 450e9, 50e9)
    assert (second.memory_bytes, second.inside, second.between) == (39 << 30, 100e9, 25e9)
    assert node_device(second).inside.bytes_per_second == 100e9
    assert node_device(second).inside.latency == device("a100-40gb").inside.latency
    speeds = topology(Cluster((first, second)))
    assert speeds.speed("inside", "n1") == 450e9 and speeds.speed("between_rank", "n2") == 25e9
    assert topology(Cluster((Node("n3", 2, "h100"),))).speed("inside", "n3")  # of a plan edited by hand


@pytest.mark.parametrize(
    "text",
    [
        "devices: 0",
        "devices: -1",
        "devices: 2, memory: 0 GiB",
        "devices: 2, memory: -80 GiB",
        "devices: 2, inside: -450 GB/s",
        "devices: 2, between: 0",
        "devices: 2, kind: h1000",
        "devices: 2, kind: [h100]",
    ],
)
def test_a_cluster_that_cannot_be_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"nodes:\n  - {{name: n1, {text}}}\n")
    with pytest.raises(InputError) as caught:
        read_cluster(path)
    assert "nodes.0" in str(caught.value) or "nodes[0]" in str(caught.value), caught.value


def test_negative_bandwidth_says_why(tmp_path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes:\n  - {name: n1, devices: 2, inside: -450 GB/s}\n")
    with pytest.raises(InputError, match="it must be more than 0"):
        read_cluster(path)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 PCIe", "cuda"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "cuda"),
    ],
)
def test_gpus_are_known_by_their_drivers_name(model: str, kind: str) -> None:
    assert gpu_kind(model) == kind


def test_a_gpu_of_unknown_kind_is_said_to_be_taken_for_another() -> None:
    assert "taken for h100" in hardware_notes(Cluster((Node("n", 1, "cuda"),)))[0]
    assert not hardware_notes(Cluster((filled(Node("n", 1, "h200")), Node("m", 1))))

"""Uneven hosts, kinds of devices, links between named hosts: in files and in simulations."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from synthetic import chain_plan
from test_cli_plan import MODEL
from test_cluster_files import read, refusal

from planner.cli.plan import main as plan_command
from planner.plan.file import parse_plan, print_plan, read_plan
from planner.simulate import simulate

HOSTS = """
hosts:
  - {name: new, device: h100-sxm, count: 2, copies: 2}
  - {name: old, device: a100-80, count: 4, memory_bytes: 1e12}
  - {name: far, device: a100-40, count: 1}
network: ethernet-25
links:
  - {between: [new, new], link: ib-ndr-400}
  - {between: [old, new], link: ib-hdr-200}
"""


def test_hosts_of_different_size_and_kind(tmp_path: Path) -> None:
    cluster = read(tmp_path, HOSTS, 9)
    assert [host.num_devices for host in cluster.hosts] == [2, 2, 4, 1]
    assert [cluster.host_index(rank) for rank in range(9)] == [0, 0, 1, 1, 2, 2, 2, 2, 3]
    assert {cluster.device(rank).name for rank in range(4)} == {"h100-sxm"}
    assert cluster.hosts[2].memory_bytes == 10**12
    assert cluster.hosts[0].memory_bytes is None
    with pytest.raises(IndexError):
        cluster.host_index(9)


def test_links_between_named_hosts(tmp_path: Path) -> None:
    cluster = read(tmp_path, HOSTS, 9)
    for pair, name in {
        (0, 1): "nvlink4", (0, 2): "ib-ndr-400", (1, 7): "ib-hdr-200", (7, 1): "ib-hdr-200",
        (4, 7): "nvlink3", (8, 7): "ethernet-25", (0, 8): "ethernet-25",
    }.items():  # fmt: skip
        assert cluster.link(*pair).name == name
    assert cluster.slowest_link((3,)).name == "nvlink4"
    assert cluster.slowest_link((0, 1)).name == "nvlink4"
    assert cluster.slowest_link((1, 2, 4)).name == "ib-hdr-200"
    assert cluster.slowest_link(range(9)).name == "ethernet-25"


def test_the_first_devices_of_copies(tmp_path: Path) -> None:
    sizes = {
        num: [host.num_devices for host in read(tmp_path, HOSTS, num).hosts] for num in (1, 3, 4, 6)
    }
    assert sizes == {1: [1], 3: [2, 1], 4: [2, 2], 6: [2, 2, 2]}


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("network: ethernet-25\n", "", "no link between new and far", "[new, far]"),
        ("[old, new]", "[old, knew]", "no host has the name 'knew'", "did you mean new?"),
        ("[old, new]", "[new, new]", "[new, new]: this pair stands twice", "keep one"),
        ("[old, new]", "[old, old]", "'old' is one host", "copies"),
        ("[old, new]", "[old]", "links.1.between", "correct"),
        ("name: far", "name: old", "two hosts have one name: new, old, old", "copies"),
        ("ib-hdr-200", "ib-hdr-2000", "unknown link 'ib-hdr-2000'", "ib-hdr-200"),
        ("copies: 2", "copies: 0", "hosts.0.copies = 0", "correct"),
        ("memory_bytes: 1e12", "memory_bytes: -1", "hosts.1.memory_bytes.value = -1", "correct"),
        ("link: ib-ndr-400", "lnk: ib-ndr-400", "links.0.lnk", "link"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str, hint: str) -> None:
    error = refusal(tmp_path, HOSTS.replace(old, new))
    assert error.message.startswith(("lab.yaml: ", "unknown link"))
    assert message in error.message
    assert hint in error.hint


def test_a_network_is_not_needed_where_every_pair_has_a_link(tmp_path: Path) -> None:
    text = HOSTS.replace("network: ethernet-25\n", "")
    for pair in ("new", "old"):
        text += f"  - {{between: [far, {pair}], link: ethernet-10}}\n"
    cluster = read(tmp_path, text, 9)
    assert cluster.link(0, 8).name == cluster.network.name == "ethernet-10"


def test_without_a_name_a_host_is_called_by_its_place(tmp_path: Path) -> None:
    text = HOSTS.replace("network: ethernet-25\n", "").replace("name: far, ", "")
    assert "no link between new and hosts.2" in refusal(tmp_path, text).message


def test_the_simulator_and_the_plan_file_keep_the_links(tmp_path: Path) -> None:
    """A ring over three hosts: one of its hops is ten times slower than the others."""
    text = """
hosts:
  - {name: a, device: a100-80, count: 1}
  - {name: b, device: a100-80, count: 1}
  - {name: c, device: a100-80, count: 1}
network: {name: usual, bandwidth: 1e6, latency_seconds: 0}
links: [{between: [c, a], link: {name: slow, bandwidth: 1e5, latency_seconds: 0}}]
"""
    cluster = read(tmp_path, text, 3)
    plan = chain_plan(6, 3, 1, width=10**5, cluster=cluster)
    assert parse_plan(print_plan(plan)) == plan
    simulation = simulate(plan)
    sent = {name: count for name, count in simulation.link_bytes.items() if "port" in name}
    assert sent["slow port of rank 2, out"] == 4 * 10**5
    assert sent["usual port of rank 1, out"] == 4 * 4 * 10**5  # two forward, two back
    without = read(tmp_path, text.partition("links:")[0], 3)
    usual = simulate(chain_plan(6, 3, 1, width=10**5, cluster=without))
    slower = 2 * (4 - 0.4)  # one hop there, one back
    assert simulation.step_seconds == pytest.approx(usual.step_seconds + slower)


def test_a_plan_on_uneven_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.py").write_text(MODEL)
    Path("lab.yaml").write_text(HOSTS)
    words = [
        "small.py", "--gpus", "6", "--cluster", "lab.yaml", "--replicas", "3", "--pipeline-ranks",
        "2", "--micro-batches", "2", "--stages-per-rank", "1", "--no-recompute",
    ]  # fmt: skip
    made = CliRunner().invoke(plan_command, words)
    assert made.exit_code == 0, made.output
    assert [host.name for host in read_plan("small.plan.yaml").cluster.hosts] == [
        "new", "new", "old",
    ]  # fmt: skip

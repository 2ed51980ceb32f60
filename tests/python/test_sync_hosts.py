"""Two hosts, each a network namespace of this machine, with a virtual link between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import train_mlp

SCRIPT = Path(train_mlp.__file__)
SECONDS = 100
# A link with this on it: half a millisecond each way, one packet in a thousand lost.
NETEM = ["delay", "500us", "loss", "0.1%"]


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*arguments], capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Hosts:
    names: tuple[str, str]
    addresses: tuple[str, str]
    link: str


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two namespaces that see each other and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (Debian: iproute2)")
    own = os.getpid()
    found = Hosts((f"bn{own}a", f"bn{own}b"), ("10.77.0.1", "10.77.0.2"), "bnlink")
    steps = [["ip", "netns", "add", name] for name in found.names]
    a, b = found.names
    link = ["ip", "link", "add", found.link, "netns", a, "type", "veth", "peer", "name"]
    steps.append([*link, found.link, "netns", b])
    for name, address in zip(found.names, found.addresses, strict=True):
        steps += [
            ["ip", "-n", name, "address", "add", f"{address}/24", "dev", found.link],
            ["ip", "-n", name, "link", "set", found.link, "up"],
            ["ip", "-n", name, "link", "set", "lo", "up"],
        ]
    try:
        for step in steps:
            done = ip(*step)
            if done.returncode != 0:
                pytest.skip(f"this machine refuses '{' '.join(step)}': {done.stderr.strip()}")
        yield found
    finally:
        for name in found.names:
            ip("ip", "netns", "delete", name)


def train(hosts: Hosts, out: Path) -> None:
    """One process on each host, as docs/distributed.md starts them."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": hosts.link,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("TORCH_BN_MNIST", None)
    launcher = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", hosts.addresses[0]]
    launcher += ["--master-port", "29511", "--node-rank"]
    job = [str(SCRIPT), "--data-url", "http://127.0.0.1:9/", "--epochs", "1", "--threads", "1"]
    job += ["--sync-bn", "--out", str(out)]
    python = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *python, *launcher, str(rank), *job],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(hosts.names)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def trained(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hosts")
    train(hosts, out)
    return out / "model.pt"


def packets(hosts: Hosts) -> int:
    shown = ip("ip", "-n", hosts.names[0], "-s", "link", "show", hosts.link).stdout.split("\n")
    number = next(i for i, line in enumerate(shown) if "TX:" in line)
    return int(shown[number + 1].split()[1])


def test_two_hosts_train_together(hosts: Hosts, trained: Path) -> None:
    state = torch.load(trained, weights_only=True)
    assert state["bn1.num_batches_tracked"] == 20
    assert all(torch.isfinite(value).all() for value in state.values())
    # What they said went over the link: two layers twice a step at the least.
    assert packets(hosts) > 20 * 4


def test_delay_and_loss_change_no_bit(hosts: Hosts, trained: Path, tmp_path: Path) -> None:
    for name in hosts.names:
        where = ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", hosts.link, "root"]
        shaped = ip(*where, "netem", *NETEM)
        if shaped.returncode != 0:
            pytest.skip(f"this machine's kernel has no netem: {shaped.stderr.strip()}")
    train(hosts, tmp_path)
    want, got = (torch.load(path, weights_only=True) for path in (trained, tmp_path / "model.pt"))
    assert all(torch.equal(want[name], got[name]) for name in want)

"""A host in a network namespace is cut off for longer than a host may be silent, and comes back."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from processes import Fleet, alone, fleet, steps_done, updates, wait_until

from esjax.hosts.coordination.registry import SILENT
from esjax.hosts.status import fetch_status
from esjax.training.replay import replay

__all__ = ["fleet"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Link:
    """A pair of interfaces: one here with the address `.1`, the other in a namespace with the address `.2`."""

    def __init__(self) -> None:
        number = os.getpid() % 250
        self.name = f"esjax-{number}"
        self.here, self.there = f"esh{number}", f"est{number}"
        self.address = f"10.213.{number}.1"
        ip("netns", "add", self.name)
        ip("link", "add", "name", self.here, "type", "veth", "peer", "name", self.there, "netns", self.name)
        ip("address", "add", f"{self.address}/24", "dev", self.here)
        ip("link", "set", self.here, "up")
        ip("-n", self.name, "address", "add", f"10.213.{number}.2/24", "dev", self.there)
        ip("-n", self.name, "link", "set", self.there, "up")

    def set(self, state: str) -> None:
        ip("link", "set", self.here, state)

    def close(self) -> None:
        subprocess.run(["ip", "link", "delete", self.here], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)


@pytest.fixture
def link() -> Iterator[Link]:
    made = None
    try:
        made = Link()
        yield made
    except (OSError, subprocess.CalledProcessError) as error:
        if made is not None:
            raise
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        if made is not None:
            made.close()


@pytest.mark.nightly  # it waits for more than a minute
def test_a_host_that_is_cut_off_for_a_while_changes_nothing(fleet: Fleet, link: Link, lenient_promotion: None) -> None:
    """The updates are those of one process: nothing is lost or doubled."""
    server = fleet.serve("--plain-text-anywhere", bind=f"tcp://{link.address}:0")
    fleet.join("near")
    far = fleet.join("far", within=["ip", "netns", "exec", link.name])

    def states() -> dict[str, str]:
        return {host.name: host.state for host in fetch_status(fleet.address).hosts}

    def more_steps(count: int) -> None:
        done = steps_done(fleet.run)
        wait_until(lambda: steps_done(fleet.run) >= done + count)

    wait_until(lambda: states() == {"near": "ready", "far": "ready"})
    more_steps(5)
    link.set("down")
    cut = time.monotonic()
    wait_until(lambda: states().get("far") != "ready")
    more_steps(10)
    while time.monotonic() < cut + SILENT + 5:
        more_steps(1)
    link.set("up")
    wait_until(lambda: states() == {"near": "ready", "far": "ready"})
    more_steps(10)
    assert far.popen.poll() is None
    server.send(signal.SIGTERM)
    assert server.ends() == 0
    assert "Traceback" not in server.output
    assert "far is lost" in server.output
    found = updates(fleet.run)
    assert found == alone(fleet, len(found))[0]
    assert replay(fleet.run).agrees

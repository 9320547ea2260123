"""What is kept of a run over hosts: updates behind the horizon, and the checkpoint of a loop that is left half-way."""

import subprocess
import sys
from pathlib import Path

from hosts_simulation import Simulation, check_updates, config_of
from processes import TEXT, Fleet, environment, fleet, steps_done, updates, wait_until

from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, to_yaml
from esjax.hosts.protocol.request_channel import DEAF
from esjax.hosts.protocol.worker import BEAT
from esjax.runs.checkpoint import kept_steps
from esjax.runs.ledger import UPDATE, read
from esjax.training.replay import replay

__all__ = ["fleet"]


class _Shortened:
    """A history whose updates before `first` were dropped."""

    def __init__(self, sim: Simulation) -> None:
        self._ledger, self.first = sim.ledger, 0

    def updates(self, from_step: int, limit_bytes: int) -> list[bytes]:
        assert from_step >= self.first, "it was dropped"
        return [payload for _, payload in self._ledger[from_step:]][:10]


def test_a_host_that_asks_for_dropped_updates_gets_the_snapshot() -> None:
    """Reference: the state that all updates lead to."""
    sim = Simulation(config_of(checkpoint_time=10))
    history = _Shortened(sim)
    sim.add("a")
    sim.add("b")
    sim.server._downloads._history = history
    sim.run_steps(3)
    cut = sim.hosts["b"]
    cut.cut = {"request", "reply", "broadcast"}
    sim.run(60)
    history.first = sim.checkpoints[-1].step
    assert history.first > cut.device.step + 10
    cut.cut = set()
    sim.run(DEAF + 2 * BEAT)
    assert cut.device.loaded
    assert cut.device.step >= len(sim.ledger) - 1
    sim.add("c")
    sim.run_steps(5)
    assert sim.hosts["c"].device.step >= len(sim.ledger) - 1
    check_updates(sim.updates, sim.config)
    states = {host.device.state for host in sim.hosts.values() if host.device.step == len(sim.ledger) - 1}
    assert len(states) <= 1


def test_a_run_with_a_horizon_takes_in_hosts_and_goes_on_after_a_crash(fleet: Fleet, lenient_promotion: None) -> None:
    """A host joins when the first updates are dropped; then the coordinator is killed, and started again."""
    server = fleet.serve("--ledger-horizon", "4", "--keep-checkpoints", "1", "--checkpoint-time", "0.2")
    fleet.join("first")
    wait_until(lambda: begins(fleet) > 0)
    fleet.join("second")
    server.wait_for("second joins")
    before = begins(fleet)
    wait_until(lambda: begins(fleet) > before)
    server.popen.kill()
    server.ends()
    again = fleet.serve_again("--steps", str(begins(fleet) + steps_done(fleet.run) + 40))
    assert again.ends() == 0
    for process in (server, again):
        assert "Traceback" not in process.output
    assert "the run can be replayed from the oldest checkpoint at or after it, not from the start" in again.output
    replayed = replay(fleet.run)
    assert replayed.agrees
    assert replayed.first >= begins(fleet) > before
    assert max(kept_steps(fleet.run / "checkpoints")) == int(replayed.state.step)


def begins(fleet: Fleet) -> int:
    """Return the step of the first update that is kept."""
    return next((record.step for record in read(fleet.run / "ledger") if record.kind == UPDATE), 0)


LEFT = """
import sys
import esjax
from esjax.config.settings import from_yaml
from pathlib import Path

server = esjax.serve(from_yaml(Path(sys.argv[1]).read_text(), ""), sys.argv[2], bind="tcp://127.0.0.1:0")
server.on_start = lambda: print("esjax join", server.address, flush=True)
for info in server:
    if info.step == 5:
        break
print("left", flush=True)
"""


def test_a_loop_over_hosts_that_is_left_leaves_a_checkpoint(
    fleet: Fleet, tmp_path: Path, lenient_promotion: None
) -> None:
    config = Config(
        checkpoint_time=1000.0,
        data=DataConfig(text=str(TEXT), window=8),
        es=EsConfig(population_size=64, chunk_pairs=4),
        model=GruConfig(hidden_size=8, head_size=8),
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    words = [sys.executable, "-c", LEFT, str(tmp_path / "config.yaml"), str(fleet.run)]
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as left:
        assert left.stdout is not None
        fleet.address = left.stdout.readline().split()[-1]
        fleet.join("one")
        out, errors = left.communicate(timeout=300)
    assert (left.returncode, out) == (0, "left\n"), errors
    assert kept_steps(fleet.run / "checkpoints")[0] == len(updates(fleet.run)) >= 5
    assert replay(fleet.run).agrees

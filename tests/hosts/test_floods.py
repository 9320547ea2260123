"""Floods of a coordinator's ports while hosts train; rows are those of the list of faults.

References: steps go on, an honest host joins, checkpoints are written, and the flood is turned down.
"""

import errno
import math
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest
from bench.floods import join, process
from processes import PATIENCE, TEXT, Fleet, fleet, free_port, steps_done, wait_until
from transports import is_closed

from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.hosts.coordination import admission
from esjax.hosts.serve import serve
from esjax.hosts.status import fetch_status
from esjax.hosts.transport.flood_guard import prepare_process
from esjax.hosts.transport.keys import ServerKeys
from esjax.hosts.transport.sockets import new_keypair
from esjax.runs.checkpoint import kept_steps

__all__ = ["fleet"]


FLOODS = {"fetches": "requests before their time", "subscriptions of a token holder": "connections cut off"}
"""Floods, and the counters that show them."""


def test_row_57_a_token_holder_floods_fetches_and_subscriptions(
    fleet: Fleet, lenient_promotion: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "LEAST_BYTES", 1)  # the flood reaches its quota at once
    config = Config(
        es=EsConfig(population_size=64, chunk_pairs=4),
        data=DataConfig(text=str(TEXT), window=8),
        model=GruConfig(hidden_size=8, head_size=8),
    )
    port, keys = free_port(), fleet.folder / "keys"
    server = serve(config, fleet.run, bind=f"tcp://127.0.0.1:{port}", keys=keys, tell=print)

    @contextmanager
    def giving_up() -> Iterator[Callable[[], None]]:
        until = time.monotonic() + PATIENCE

        def check() -> None:
            assert time.monotonic() < until, "waited too long"

        fleet.address = server.address
        fleet.join("first", "--token-file", str(server.token))
        yield check

    server.while_open = giving_up
    counters: dict[str, int] = {}
    joining: Future[tuple[float, int]] | None = None
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        for count, _ in enumerate(server):
            counters = server.status().counters
            if count == 5:
                token = ServerKeys(keys, new_keypair, print).new_token("greedy", server.address)
                for flood in FLOODS:
                    stack.enter_context(process(flood, "127.0.0.1", str(port), str(port + 1), str(token)))
            if joining is None and all(counters.get(sign, 0) >= 4 for sign in FLOODS.values()):
                joining = pool.submit(join, server)
                begun = count
            if joining is not None and joining.done() and count >= begun + 20:
                break
        assert joining is not None
        assert joining.result()[0] < math.inf
    assert counters.get("downloads above the quota of a token", 0) < 200  # thousands if each request had an answer


def test_row_56_with_few_descriptors_and_many_idle_connections_training_goes_on(
    fleet: Fleet, lenient_promotion: None
) -> None:
    server = fleet.serve(within=["bash", "-c", 'ulimit -n 64; exec "$@"', "bash"])
    fleet.join("one")
    wait_until(lambda: steps_done(fleet.run) >= 5)
    prepare_process()
    port = int(fleet.address.rsplit(":", 1)[1])
    with ExitStack() as stack:
        idle = [stack.enter_context(closing(socket.socket())) for _ in range(3000)]
        for connection in idle:
            connection.setblocking(False)
            assert connection.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS)
        wait_until(lambda: any(map(is_closed, idle[:10])))
        step = steps_done(fleet.run)
        wait_until(lambda: max(kept_steps(fleet.run / "checkpoints"), default=0) > step)
        assert fetch_status(fleet.address).hosts[0].state == "ready"
        server.send(signal.SIGTERM)
        assert server.ends() == 0
    assert server.output.count("127.0.0.1 has more than") == 1, server.output
    assert "Traceback" not in server.output

"""`serve` and `resume_serving`: the coordinator of a run whose hosts join over the network."""

import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax

from esjax.config.custom_names import identities
from esjax.config.settings import Config, replace
from esjax.data.corpus import Corpus, load_corpus, locate_text
from esjax.data.delivery import Blocks, pack_text
from esjax.data.packing import check_stream, pack_stream
from esjax.devices.mesh import cpu_mesh
from esjax.errors import EsjaxError
from esjax.exchange.update_record import unpack_update
from esjax.exchange.values import MAX_REQUEST, make_exchange
from esjax.hosts.noise_fingerprint import noise_fingerprints
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Snapshot, Terms, hash_bytes
from esjax.hosts.protocol.coordinator import Coordinator
from esjax.hosts.server_loop import ServerLoop
from esjax.hosts.transport.address import is_loopback
from esjax.hosts.transport.keys import ServerKeys
from esjax.hosts.transport.server import ServerTransport
from esjax.hosts.transport.sockets import Limits as Sizes
from esjax.hosts.transport.sockets import check_curve, new_keypair
from esjax.inference.loaded_run import load_run_corpus, restore_run
from esjax.models.custom import Custom, Reward
from esjax.models.custom_code import gather
from esjax.models.member import Loss
from esjax.models.model import ModelFactory
from esjax.paths import given_path
from esjax.replica.replica import Replica
from esjax.replica.snapshot import to_bytes
from esjax.runs.checkpoint import Checkpoints
from esjax.runs.folder import RunFolder
from esjax.runs.ledger import Ledger
from esjax.runs.reader import read_run
from esjax.runs.step_info import Limits, StepInfo
from esjax.signals import STOPPING, stop_on_signals
from esjax.watch.summary import describe_run
from esjax.watch.trackers import JsonLines, find_trackers, tracked_run
from esjax.watch.tracking import Tracker, Watch

REQUEST_LIMITS = Sizes(MAX_REQUEST, wire.FRAMES)
"""Largest message that a host may send."""

ADDRESS = "tcp://127.0.0.1:5555"
"""Default address of a coordinator."""

FIRST_TOKEN = "hosts"
"""Name of the token that is made together with the keys."""


class _Listen(NamedTuple):
    """Address and keys of the coordinator, see `serve`."""

    address: str
    keys: Path | None
    plain_text_anywhere: bool

    @classmethod
    def at(cls, address: str, keys: str | Path | None, plain_text_anywhere: bool) -> "_Listen":
        return cls(address, None if keys is None else given_path(keys), plain_text_anywhere)


class Server:
    """A run that hosts take part in: iterate over it to coordinate them.

    Iteration ends at the limits of the settings, or at Ctrl-C or SIGTERM. One of the hosts then makes a last checkpoint
    and a last evaluation.

    Attributes:
        config: Settings.
        custom: Custom model, loss, reward and optimizer, which every host needs, too.
        folder: Folder of the run.
        limits: When iteration ends; may be changed.
        baselines: Held-out losses of the n-gram models, in nats per token; empty without held-out documents, and with a
            custom loss or reward.
        address: Address that hosts join at; the port is known when iteration has begun.
        token: Token file that hosts need, or None.
        on_start: Called when an iteration has opened port and files, before hosts may join.
        while_open: Makes a context that is entered when hosts may join, and left at the end.
        trackers: Trackers of the run; may be changed between iterations.
        last: Info of the last step, or None.
        stopped: Whether Ctrl-C or SIGTERM came during the last iteration.
    """

    def __init__(
        self,
        folder: RunFolder,
        corpus: Corpus,
        listen: _Listen,
        custom: Custom,
        replica: Replica,
        trackers: Sequence[Tracker],
        tell: Callable[[str], None] | None,
        *,
        is_new: bool,
    ) -> None:
        """Set up; call `serve` or `resume_serving` instead."""
        self.config = folder.config
        self.custom = custom
        self.folder = folder
        self.limits = Limits(self.config.steps, self.config.seconds)
        has_baselines = corpus.held_out and custom.objective is None
        self.baselines = corpus.baselines(corpus.held_out) if has_baselines else {}
        self.address = listen.address
        self.token: Path | None = None
        self.on_start: Callable[[], None] = lambda: None
        self.while_open: Callable[[], AbstractContextManager[None]] = nullcontext
        self.trackers = list(trackers)
        self.last: StepInfo | None = None
        self.stopped = False
        self.tell = tell or (lambda line: print(line, file=sys.stderr))
        self._corpus, self._listen = corpus, listen
        self._replica = replica  # gives shapes and sizes, and computes nothing
        self._coordinator: Coordinator | None = None
        self._is_new = is_new

    def __repr__(self) -> str:
        """Name folder and address, and summarize the run."""
        return f"<esjax run for hosts in {str(self.folder.path)!r} at {self.address}: {self.summary()}>"

    def summary(self) -> str:
        """Describe model, text and step size in one line."""
        return describe_run("hosts", self.config, self._corpus, self._replica.state.params, self.custom.names())

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self._listen.address)

    def status(self) -> wire.Status:
        """Return the status of the run and its hosts.

        Raises:
            EsjaxError: Iteration has not begun.
        """
        if self._coordinator is None:
            raise EsjaxError("the run has no status yet; iterate over it first")
        return self._coordinator.status(time.monotonic())

    def __iter__(self) -> Iterator[StepInfo]:
        """Coordinate the hosts, and yield an info for each step."""
        with ExitStack() as stack:
            asked = stack.enter_context(stop_on_signals())
            # Closed last, so that a tracker that hangs delays nothing else.
            watch = stack.enter_context(Watch(self.trackers, lambda line: self.tell(line)))
            coordinator, server_loop = self._open(stack)
            self.limits.check(coordinator.step)
            self._coordinator = coordinator
            watch.start(tracked_run(self.folder, self.baselines, coordinator.step), JsonLines(self.folder, self.tell))
            self.on_start()
            stack.enter_context(self.while_open())
            stopping = False
            pending: StepInfo | None = None  # the last step waits for the last evaluation
            began_at = 0.0
            while not coordinator.finished:
                if asked.is_set() and not stopping:
                    stopping = True
                    self.tell(STOPPING)
                    coordinator.stop(time.monotonic(), done=False)
                for info in server_loop.turn():
                    now = time.monotonic()
                    began_at = began_at or now
                    if self.limits.reached(info.step, now - began_at) and not stopping:
                        stopping, pending = True, info
                        coordinator.stop(now, done=True)
                    else:
                        yield self._kept(info, watch)
            self.stopped = asked.is_set()
            held_out = server_loop.new_held_out()
            if pending is not None:
                yield self._kept(pending if held_out is None else pending._replace(held_out=held_out), watch)
            elif self.last is not None and held_out is not None:
                self.last = self.last._replace(held_out=held_out)

    def _kept(self, info: StepInfo, watch: Watch) -> StepInfo:
        self.last = info
        watch.log(info)
        return info

    def _open(self, stack: ExitStack) -> tuple[Coordinator, ServerLoop]:
        """Lock the folder, open the port, and restore the state of the run."""
        folder = self.folder
        folder.lock()
        stack.callback(folder.unlock)
        with ExitStack() as undo:
            if self._is_new and not folder.checkpoints.exists():
                undo.callback(folder.remove)  # a port in use must not leave an empty run folder
            opened = self._begin(stack)
            undo.pop_all()
        self._is_new = False
        return opened

    def _begin(self, stack: ExitStack) -> tuple[Coordinator, ServerLoop]:
        config, folder, corpus = self.config, self.folder, self._corpus
        folder.keep_baselines(self.baselines)
        checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints)
        ledger = stack.enter_context(closing(Ledger.open(folder.ledger, self.tell)))
        replica = self._replica
        restored = restore_run(folder, replica.state, self.tell)
        first = int(restored.state.step)
        if not first:
            checkpoints.save(restored.state, 0.0, 0)
        if ledger.next and not ledger.first <= first <= ledger.next:
            raise EsjaxError(
                f"the ledger of {str(folder.path)!r} holds steps {ledger.first} to {ledger.next}, and the newest "
                f"checkpoint is of step {first}; restore the ledger, or move it away to go on from that checkpoint"
            )
        since = list(map(unpack_update, _all_updates(ledger, first)))
        keys = self._keys()
        transport = stack.enter_context(
            ServerTransport(
                self._listen.address,
                keys=keys,
                limits=REQUEST_LIMITS,
                tell=self.tell,
                plain_text_anywhere=self._listen.plain_text_anywhere,
            )
        )
        self.address = _for_others(transport.address)
        stack.enter_context(folder.keep_address(self.address, self.token))
        now, run = time.monotonic(), read_run(folder.path)
        data = to_bytes(restored.state)
        stream = pack_stream(corpus.train)
        check_stream(len(stream), config.data.burn_in + config.data.window)
        size, block_tokens = corpus.vocabulary.size, config.data.block_tokens
        blocks = Blocks(stream, size, config.seed, block_tokens) if block_tokens else None
        coordinator = Coordinator(
            config,
            Terms(
                run=folder.name,
                incarnation=folder.next_incarnation(),
                quantum=replica.chunk_pairs,
                vocab_size=size,
                fingerprints=noise_fingerprints(),
                custom=identities(folder.custom, folder.code),
                publish_port=transport.publish_port,
                state_bytes=len(data),
                exchange=make_exchange(replica.vector_length, replica.scale),
            ),
            step=first + len(since),
            now=now,
            rng=np.random.default_rng(),
            text=pack_text(stream[:0] if blocks else stream, corpus.held_out),
            snapshot=Snapshot(first, data, hash_bytes(data)),
            history=ledger,
            last_update=b"".join(ledger.updates(ledger.next - 1, 0)),
            block=blocks,
            measured=run.last("held_out") is not None,
        )
        members = config.es.members_per_pair * sum(pairs for update in since for _, pairs in update.header.spans)
        a_member = config.data.batch_size * config.data.window
        server_loop = ServerLoop(
            config,
            coordinator,
            transport,
            ledger,
            checkpoints,
            replica.state,
            keys=keys,
            # Ledgers of older versions have no clock, but the metrics have.
            seconds=max(restored.seconds, ledger.seconds, run.seconds_at(coordinator.step)),
            member_tokens=restored.member_tokens + members * a_member,
            tell=self.tell,
        )
        return coordinator, server_loop

    def _keys(self) -> ServerKeys | None:
        """Open the keys if the address needs them; new keys come with a first token."""
        listen = self._listen
        if not _has_keys(listen):
            return None
        path = listen.keys or self.folder.path / "keys"
        keys = ServerKeys(path, new_keypair, self.tell, (FIRST_TOKEN, _for_others(listen.address)))
        token = path / f"{FIRST_TOKEN}.token"
        self.token = token if token.exists() else None
        return keys


def _make_replica(config: Config, corpus: Corpus, custom: Custom) -> Replica:
    """Set up a replica on one CPU, which checks custom code and sizes.

    Raises:
        EsjaxError: A custom model, loss or reward does not keep its contract, or gradient sums or updates would be too
            large for a message.
    """
    model = custom.build(config.model, corpus.vocabulary.size)
    replica = Replica(config, model, None, cpu_mesh(), custom.objective, custom.optimizer)
    if 4 * replica.vector_length > MAX_REQUEST:
        raise EsjaxError(
            f"a gradient sum of this model has {replica.vector_length:,} numbers, and hosts can send at most "
            f"{MAX_REQUEST // 4:,}; choose a smaller model, or es.exchange losses with noise on weights"
        )
    weights = config.es.pairs * config.es.weights_per_pair
    if config.es.time_per_step is None and not replica.vector_length and weights > wire.MOST_WEIGHTS:
        raise EsjaxError(
            f"an update would hold {weights:,} weights, and {wire.MOST_WEIGHTS:,} are the most; lower "
            "es.population_size"
        )
    return replica


def _has_keys(listen: _Listen) -> bool:
    """Return whether hosts need keys.

    Raises:
        EsjaxError: They do, and connections cannot be encrypted; or the address is not valid.
    """
    if listen.keys is None and (listen.plain_text_anywhere or is_loopback(listen.address)):
        return False
    check_curve()
    return True


def _for_others(address: str) -> str:
    """Replace the address of all interfaces, which has no meaning elsewhere, by this machine's name."""
    return re.sub(r"//(0\.0\.0\.0|\*|\[::\]):", f"//{socket.gethostname()}:", address)


def _all_updates(ledger: Ledger, first: int) -> Iterator[bytes]:
    while first < ledger.next:
        updates = ledger.updates(first, wire.MAX_BODY)
        yield from updates
        first += len(updates)


def serve(
    config: Config | None,
    out: str | Path,
    *,
    bind: str = ADDRESS,
    keys: str | Path | None = None,
    plain_text_anywhere: bool = False,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Server:
    """Begin a run that hosts take part in; iterate over the result to coordinate them.

    Args:
        config: Settings. None: the defaults.
        out: Folder of the new run.
        bind: Address to listen at, tcp://HOST:PORT; broadcasts use the next port. Port 0: any two free ports.
        keys: Folder of the keys. None: `keys` in the run folder, or no keys on a loopback address.
        plain_text_anywhere: Listen on any address without keys: every machine that reaches it can read all messages and
            take part.
        model: A function that builds a custom model. Every host needs each custom part, too: the same function, or, for
            a text PATH.py:FUNCTION, a copy of the same file, see `esjax.train`.
        loss: A custom loss.
        reward: A custom reward, in place of a loss.
        optimizer: A custom optimizer: any optax transformation.
        trackers: Trackers of the run, see `esjax.Tracker`, or names: tensorboard, wandb, trackio.
        tell: Prints a line for the user. None: print to standard error.

    Raises:
        EsjaxError: The text cannot be used, the folder exists already, the package of a tracker is missing, a custom
            loss or reward does not return one float32, or the optimizer needs more arguments than it gets. Iteration
            raises it, and removes the folder, if it cannot listen at the address.
    """
    config, out = replace(locate_text(config or Config()), ledger=True), given_path(out)
    found = find_trackers(trackers)
    custom = gather(model=model, loss=loss, reward=reward, optimizer=optimizer)
    corpus = load_corpus(config.data)
    replica = _make_replica(config, corpus, custom)  # errors come before a folder is made
    listen = _Listen.at(bind, keys, plain_text_anywhere)
    _has_keys(listen)
    folder = RunFolder.create(out, config, corpus.vocabulary, corpus.digest, custom.names(), custom.code)
    server = Server(folder, corpus, listen, custom, replica, found, tell, is_new=True)
    if corpus.note:
        server.tell(corpus.note)
    return server


def resume_serving(
    path: str | Path,
    *,
    bind: str = ADDRESS,
    keys: str | Path | None = None,
    plain_text_anywhere: bool = False,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    text: str | None = None,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Server:
    """Resume a run with hosts, from its newest whole checkpoint (or its first state) and the ledger since.

    Args:
        path: Run folder.
        bind: See `serve`.
        keys: See `serve`.
        plain_text_anywhere: See `serve`.
        model: The custom model, if the run has one, see `esjax.resume`.
        loss: The custom loss, if the run has one.
        reward: The custom reward, if the run has one.
        optimizer: The custom optimizer, if the run has one.
        steps: End when the run has done so many steps in all.
        seconds: End so many seconds after the next step finishes. If both are None, the limits of the settings hold.
        text: New place of the run's text, as in the setting data.text. None: it has not moved.
        trackers: Trackers of the run, see `esjax.Tracker`, or names: tensorboard, wandb, trackio.
        tell: Prints a line for the user. None: print to standard error.

    Raises:
        EsjaxError: The path is not a run folder, its text or code has changed, or a custom part is missing.
    """
    folder = RunFolder(given_path(path))
    folder.check_goes_on()
    custom = gather(folder.code, model=model, loss=loss, reward=reward, optimizer=optimizer)
    folder.check_custom(custom.names(), "esjax.resume_serving")
    listen = _Listen.at(bind, keys, plain_text_anywhere)
    corpus = load_run_corpus(folder, text)
    if text is not None:
        folder.keep_config()
    replica = _make_replica(folder.config, corpus, custom)
    server = Server(folder, corpus, listen, custom, replica, find_trackers(trackers), tell, is_new=False)
    if steps is not None or seconds is not None:
        server.limits = Limits(steps, seconds)
    return server

"""`serve` and `resume_serving`: the coordinator of a run whose hosts join over the network."""

import re
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax

from esjax.config.custom_names import identities
from esjax.config.settings import Config, replace
from esjax.data.corpus import Corpus, load_corpus, locate_text
from esjax.data.delivery import hash_bytes, pack_text
from esjax.data.packing import check_stream
from esjax.devices.mesh import cpu_mesh
from esjax.errors import EsjaxError
from esjax.exchange.update_record import pair_count, unpack_update
from esjax.exchange.values import MAX_REQUEST, make_exchange
from esjax.hosts.coordination.coordinator import Coordinator
from esjax.hosts.known_answers import known_answers
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Snapshot, Terms
from esjax.hosts.server_loop import ServerLoop
from esjax.hosts.transport.address import is_loopback
from esjax.hosts.transport.flood_guard import prepare_process
from esjax.hosts.transport.keys import ServerKeys
from esjax.hosts.transport.server import EACH_TOKEN, ServerTransport
from esjax.hosts.transport.sockets import Limits as Sizes
from esjax.hosts.transport.sockets import check_curve, new_keypair
from esjax.inference.loaded_run import complete_custom, load_run_corpus, restore_run
from esjax.models.custom import Custom, Reward, Tool
from esjax.models.custom.code import load_custom
from esjax.models.member import Loss
from esjax.models.model import ModelFactory
from esjax.paths import given_path
from esjax.replica.replica import Replica
from esjax.replica.snapshot import to_bytes
from esjax.rewards.prompts import check_for_hosts
from esjax.rewards.scoring import begin
from esjax.runs.folder import RunFolder
from esjax.runs.ledger import UPDATE, read
from esjax.runs.reader import read_run
from esjax.runs.step_info import Limits, StepInfo
from esjax.signals import STOPPING, started
from esjax.watch.recorded_run import RecordedRun, Recorder
from esjax.watch.trackers import find_trackers
from esjax.watch.tracking import Tracker
from esjax.weights.first import first_params, start_of

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


class Server(RecordedRun):
    """A run that hosts take part in: iterate over it to coordinate them.

    Iteration ends at the limits of the settings, at Ctrl-C or SIGTERM, or at `stop`. One of the hosts then makes a last
    checkpoint and a last evaluation; a loop that is left half-way waits for them, too. Between two steps, signals are
    the program's own, see `handling_signals`.

    Attributes:
        config: Settings.
        corpus: The text.
        custom: Custom model, loss, reward, tool and optimizer, which every host needs, too.
        folder: Folder of the run.
        limits: When iteration ends; may be changed.
        baselines: Held-out losses of the n-gram models, in nats per token; empty without held-out documents, and with a
            custom loss or reward.
        address: Address that hosts join at; the port is known when iteration has begun.
        token: Token file that hosts need, or None.
        on_start: Called when an iteration has opened port and files, before hosts may join.
        while_open: Makes a context that is entered when hosts may join, and left at the end. It may give a function,
            which is called again and again meanwhile.
        trackers: Trackers of the run; may be changed between iterations.
        last: Info of the last step, or None.
        stopped: Whether Ctrl-C or SIGTERM came, or `stop` was called, during the last iteration.
    """

    folder: RunFolder
    _devices = "hosts"

    def __init__(
        self,
        folder: RunFolder,
        corpus: Corpus,
        listen: _Listen,
        custom: Custom,
        replica: Replica,
        trackers: Sequence[Tracker],
        tell: Callable[[str], None] | None,
    ) -> None:
        """Set up; call `serve` or `resume_serving` instead."""
        super().__init__(replace(folder.config, ledger=True), corpus, folder, custom, trackers, tell)
        self.address = listen.address
        self.token: Path | None = None
        self.while_open: Callable[[], AbstractContextManager[Callable[[], None] | None]] = nullcontext
        self._listen = listen
        self._replica = replica  # gives shapes and sizes, and computes nothing
        self._coordinator: Coordinator | None = None

    def __repr__(self) -> str:
        """Name folder and address, and summarize the run."""
        return f"<esjax run for hosts in {str(self.folder.path)!r} at {self.address}: {self.summary()}>"

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

    def _steps(self) -> Generator[StepInfo]:
        """Coordinate the hosts, and yield an info for each step."""
        with ExitStack() as stack:
            recorder = stack.enter_context(self._recording())
            coordinator, server_loop = self._open(stack, recorder)
            self._coordinator = coordinator
            self.on_start()
            started()  # the loop below looks for signals all the time
            check = stack.enter_context(self.while_open())
            stopping = False
            closed = deque[StepInfo]()
            pending: StepInfo | None = None  # the last step waits for the last evaluation
            try:
                while not coordinator.finished:
                    if check is not None:
                        check()
                    if recorder.asked.is_set() and not stopping:
                        stopping = True
                        self.tell(STOPPING)
                        coordinator.stop(time.monotonic(), done=False)
                    closed += server_loop.turn()
                    while closed:
                        info = closed.popleft()
                        if (recorder.is_done(info.step) or self._has_settled(info)) and not stopping:
                            stopping, pending = True, info
                            coordinator.stop(time.monotonic(), done=True)
                        else:
                            yield recorder.log(info)
            except GeneratorExit:  # left half-way: a last checkpoint, too
                if not stopping:
                    coordinator.stop(time.monotonic(), done=False)
                while not coordinator.finished:
                    closed += server_loop.turn()
                for info in closed:
                    recorder.log(info)
                raise
            self.stopped = recorder.asked.is_set()
            measured = server_loop.new_measurement()
            if pending is not None:
                yield recorder.log(pending._replace(**measured))
            elif self.last is not None:
                self.last = self.last._replace(**measured)

    def _open(self, stack: ExitStack, recorder: Recorder) -> tuple[Coordinator, ServerLoop]:
        """Open files and port, and restore the state of the run."""
        with self._removing_new_folder():  # a port in use must not leave an empty run folder
            return self._begin(stack, recorder)

    def _begin(self, stack: ExitStack, recorder: Recorder) -> tuple[Coordinator, ServerLoop]:
        config, folder, corpus, replica = self.config, self.folder, self.corpus, self._replica
        restored = restore_run(folder, replica.state, self.tell)
        if restored.state is replica.state and not folder.is_new:
            params = first_params(config, self.custom)
            if params is not None:
                replica.begin(params)
                restored = restored._replace(state=replica.state)
        recorder.open_files()
        ledger = recorder.ledger
        assert ledger is not None
        first = int(restored.state.step)
        if not first:
            recorder.save(restored.state)
        step = ledger.next
        self.limits.check(step)
        keys = self._keys()
        prepare_process()
        transport = stack.enter_context(
            ServerTransport(
                self._listen.address,
                keys=keys,
                limits=REQUEST_LIMITS,
                tell=self.tell,
                plain_text_anywhere=self._listen.plain_text_anywhere,
                each_token=max(EACH_TOKEN, 2 * config.hosts.hosts_per_token),
            )
        )
        self.address = _for_others(transport.address)
        stack.enter_context(folder.keep_address(self.address, self.token))
        run = read_run(folder.path)
        updates = (record.payload for record in read(folder.ledger, first) if record.kind == UPDATE)
        pairs = sum(pair_count(unpack_update(payload).header.spans) for payload in updates)
        recorder.start(
            step,
            # Ledgers of older versions have no clock, but the metrics have.
            seconds=max(restored.seconds, ledger.seconds, run.seconds_at(step)),
            member_tokens=restored.member_tokens + config.tokens_per_pair * pairs,
        )
        data, stream = to_bytes(restored.state), corpus.stream()
        at_a_time = min(len(stream), config.data.block_tokens or len(stream))
        if not config.writes:
            check_stream(at_a_time, config.data.window_length)
        blocks = corpus.blocks(config.seed, config.data.block_tokens)
        coordinator = Coordinator(
            config,
            Terms(
                run=folder.name,
                incarnation=folder.next_incarnation(),
                quantum=replica.chunk_pairs,
                vocab_size=corpus.vocabulary.size,
                known_answers=known_answers(),
                custom=identities(folder.custom, folder.code),
                publish_port=transport.publish_port,
                state_bytes=len(data),
                exchange=make_exchange(replica.vector_length, replica.scale, replica.bounds, config.tolerance),
            ),
            step=step,
            now=time.monotonic(),
            rng=np.random.default_rng(),
            text=pack_text(
                stream[:0] if blocks else stream, corpus.measured, corpus.vocabulary if config.writes else None
            ),
            snapshot=Snapshot(first, data, hash_bytes(data)),
            history=ledger,
            last_update=b"".join(ledger.updates(ledger.next - 1, 0)),
            block=blocks,
            measured=run.last("held_out") is not None,
            trusted=_trusted_key(config.hosts.trusted_token, keys),
        )
        loop = ServerLoop(config, coordinator, transport, recorder, replica.state, keys, self.tell)
        stack.callback(loop.close)
        return coordinator, loop

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


def _trusted_key(name: str | None, keys: ServerKeys | None) -> str | None:
    """Return the public key of a token, None without a name.

    Raises:
        EsjaxError: There is no such token.
    """
    if name is None:
        return None
    allowed = {} if keys is None else keys.allowed
    found = next((key for key, token in allowed.items() if token == name), None)
    if found is None:
        names = ", ".join(sorted(allowed.values())) or "none; hosts of this address need none"
        raise EsjaxError(f"hosts.trusted_token names {name!r}, and there is no such token; there are: {names}")
    return found


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
    tool: Tool | str | None = None,
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
        tool: A tool that members call while they write for a reward in Python, see `esjax.train`.
        optimizer: A custom optimizer: any optax transformation.
        trackers: Trackers of the run, see `esjax.Tracker`, or names: tensorboard, wandb, trackio.
        tell: Prints a line for the user. None: print to standard error.

    Raises:
        EsjaxError: The text or the weights of `init` cannot be used, the folder exists already, the package of a
            tracker is missing, a custom loss or reward does not return one float32, or the optimizer needs more
            arguments than it gets. Iteration raises it, and removes the folder, if it cannot listen at the address.
    """
    custom = load_custom(model=model, loss=loss, reward=reward, tool=tool, optimizer=optimizer)
    return serve_with(
        custom,
        config or Config(),
        out,
        bind=bind,
        keys=keys,
        plain_text_anywhere=plain_text_anywhere,
        trackers=trackers,
        tell=tell,
    )


def serve_with(
    custom: Custom,
    config: Config,
    out: str | Path,
    *,
    bind: str = ADDRESS,
    keys: str | Path | None = None,
    plain_text_anywhere: bool = False,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Server:
    """`serve`, given all custom parts."""
    config, custom, vocabulary, params = start_of(config, custom)
    config, out = replace(locate_text(config), ledger=True), given_path(out)
    found = find_trackers(trackers)
    corpus = load_corpus(config.data, vocabulary)
    check_for_hosts(config.reward.prompts)
    config = begin(config, custom)
    replica = _make_replica(config, corpus, custom)  # errors come before a folder is made
    if params is not None:
        replica.begin(params)
    listen = _Listen.at(bind, keys, plain_text_anywhere)
    _has_keys(listen)
    folder = RunFolder.create(out, config, corpus.vocabulary, corpus.digest, custom.names(), custom.code, corpus.files)
    return Server(folder, corpus, listen, custom, replica, found, tell)


def resume_serving(
    path: str | Path,
    *,
    bind: str = ADDRESS,
    keys: str | Path | None = None,
    plain_text_anywhere: bool = False,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    tool: Tool | str | None = None,
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
        tool: The tool, if the run has one.
        optimizer: The custom optimizer, if the run has one.
        steps: End when the run has done so many steps in all.
        seconds: End so many seconds after the next step finishes. If both are None, the limits of the settings hold.
        text: New place of the run's text, as in the setting data.text. None: it has not moved.
        trackers: Trackers of the run, see `esjax.Tracker`, or names: tensorboard, wandb, trackio.
        tell: Prints a line for the user. None: print to standard error.

    Raises:
        EsjaxError: The path is not a run folder, its text or code has changed, or a custom part is missing.
    """
    custom = load_custom(model=model, loss=loss, reward=reward, tool=tool, optimizer=optimizer)
    return resume_serving_with(
        custom,
        path,
        bind=bind,
        keys=keys,
        plain_text_anywhere=plain_text_anywhere,
        steps=steps,
        seconds=seconds,
        text=text,
        trackers=trackers,
        tell=tell,
    )


def resume_serving_with(
    custom: Custom,
    path: str | Path,
    *,
    bind: str = ADDRESS,
    keys: str | Path | None = None,
    plain_text_anywhere: bool = False,
    steps: int | None = None,
    seconds: float | None = None,
    text: str | None = None,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Server:
    """`resume_serving`, given the custom parts that the run does not find by itself."""
    folder = RunFolder(given_path(path))
    folder.check_goes_on()
    custom = complete_custom(folder, custom, "esjax.resume_serving")
    listen = _Listen.at(bind, keys, plain_text_anywhere)
    corpus = load_run_corpus(folder, text)
    if text is not None:
        folder.keep_config()
    replica = _make_replica(folder.config, corpus, custom)
    server = Server(folder, corpus, listen, custom, replica, find_trackers(trackers), tell)
    if steps is not None or seconds is not None:
        server.limits = Limits(steps, seconds)
    return server

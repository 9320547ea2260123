"""The layout of a run folder.

config.yaml       the settings; with the custom code that run.json names, they start the same run again
run.json          version of this layout, name of the run, hash of the text; names of a custom model, loss, reward,
                  tool or optimizer, and for code in a file its path, function and hash
vocabulary.json   the symbols, ids 2 and up in order
text.jsonl        the files that the text was read from, in order: path, bytes, and BLAKE2b-128 of the bytes
metrics.jsonl     one line for each step
baselines.json    nats per token of the n-gram models over the held-out documents
samples.txt       texts that the model wrote during training
tensorboard/      event files of TensorBoard, if the run is tracked there; wandb/ for Weights & Biases
checkpoints/      see `esjax.runs.checkpoint`
ledger            every update, if the run keeps a ledger, see `esjax.runs.ledger`; with a horizon, also ledger.next
incarnation       number of starts of the coordinator; earlier runs have it in `epoch`
address           address of the running coordinator, and its token file
keys/             keys of the hosts that may join, see `esjax.hosts.transport.keys`
"""

import json
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import msgspec

from esjax import __version__
from esjax.config.custom_names import MARK, OPTIONS, Code
from esjax.config.settings import Config, from_yaml, to_yaml
from esjax.data.text_files import FileRecord
from esjax.data.vocabulary import Vocabulary, parse_vocabulary
from esjax.errors import EsjaxError
from esjax.runs.durable import try_lock, write_durably, write_new_folder, writing
from esjax.runs.reader import find_runs

RUN = "run.json"
"""Name of the file that marks a run folder."""

FORMAT = 3
"""Version of the layout, of the noise and of the arithmetic: runs of the same format are replayed bit for bit."""

TEXT_FILES = "text.jsonl"
"""Name of the list of a text's files."""

READABLE = (1, 2, 3)
"""Versions whose weights can be read."""

LOCK_TRIES = 5
"""Attempts to lock a run: a reader that checks the lock holds it for a moment, see `esjax.runs.reader.is_running`."""

LONGEST_PATH = 768 if sys.platform == "darwin" else 3840
"""Most bytes in the path of a run folder: systems allow 1024 or 4096, and checkpoints add up to 160."""

MOST_NAMED = 4
"""Most runs that an error message names if a folder of runs was given in place of a run."""

LOCK_PAUSE = 0.02
"""Seconds between two attempts."""


class RunFolder:
    """A run on disk, open for reading; write within `locked`.

    Attributes:
        path: Path of the folder.
        is_new: Whether `create` made it.
        name: Name of the run.
        text_digest: Hash of the text; "" without a text.
        custom: Names of the custom parts, by kind.
        code: Path, function and hash of custom parts that are code in a file, by kind.
        config: Settings.
        vocabulary: Symbols.
    """

    def __init__(self, path: Path) -> None:
        """Open an existing run.

        Raises:
            EsjaxError: The path is not a run folder, is damaged, or has an unknown format.
        """
        self.path = path
        try:
            there = path.is_dir()
        except OSError as error:
            raise EsjaxError(f"cannot look for the run folder {str(path)!r}: {error.strerror}") from error
        if not there:
            raise EsjaxError(f"there is no run folder {str(path)!r}")
        run = self._read_json(RUN)
        self._format = run.get("format")
        if self._format not in READABLE:
            raise EsjaxError(
                f"{str(path)!r} is a run folder of format {self._format}, this is esjax {__version__} with "
                f"format {FORMAT}; use esjax {run.get('esjax', 'of that time')}"
            )
        self.name: str = run.get("name", "")
        self.text_digest: str = run.get("text_digest", "")
        self.custom: dict[str, str] = run.get("own", {})
        self.code = self._read_code(run)
        self.config: Config = from_yaml(self._read("config.yaml"), str(path / "config.yaml"))
        self.vocabulary = self._read_vocabulary()
        self.is_new = False
        self._lock: IO[str] | None = None
        self._is_made = False

    @classmethod
    def create(
        cls,
        path: Path,
        config: Config,
        vocabulary: Vocabulary,
        text_digest: str,
        custom: Mapping[str, str] = MappingProxyType({}),
        code: Mapping[str, Code] = MappingProxyType({}),
        text_files: Sequence[FileRecord] = (),
    ) -> "RunFolder":
        """Make a new run folder, and lock it until `unlock`.

        Args:
            path: Path of the folder. If several processes make it at the same time, one of them succeeds.
            config: Settings.
            vocabulary: Symbols.
            text_digest: Hash of the text; "" for a run without a text.
            custom: Names of the custom model, loss, reward, tool and optimizer, by kind.
            code: Path, function and hash of custom parts that are code in a file, by kind.
            text_files: The files that the text was read from.

        Raises:
            EsjaxError: The path exists and is not an empty folder, or it cannot be written; nothing is left behind.
        """
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise EsjaxError(f"the path of the run folder is longer than {LONGEST_PATH} bytes; give a shorter --out")
        run = {
            "format": FORMAT,
            "esjax": __version__,
            "name": secrets.token_hex(8),
            "text_digest": text_digest,
            "own": dict(custom),
            "code": msgspec.to_builtins(dict(code)),
        }
        files = {
            "config.yaml": to_yaml(config),
            "vocabulary.json": json.dumps(vocabulary.stored(), ensure_ascii=False) + "\n",
            RUN: json.dumps(run) + "\n",  # last, since this file marks a run folder
        }
        if text_files:
            lines = (json.dumps(file._asdict()) + "\n" for file in text_files)
            files = {TEXT_FILES: "".join(lines), **files}
        try:
            is_made = write_new_folder(path, files)
        except FileExistsError as error:
            raise EsjaxError(
                f"{str(path)!r} exists already and is left alone; give another --out, or resume it"
            ) from error
        except OSError as error:
            raise EsjaxError(f"cannot write the run folder {str(path)!r}: {error.strerror}") from error
        folder = cls(path)
        folder.is_new, folder._is_made = True, is_made
        folder.lock()  # until training ends, so that nobody resumes it before it has begun
        return folder

    def remove(self) -> None:
        """Remove what `create` made, and everything in it. No other process may use the folder."""
        for inside in list(self.path.iterdir()):
            shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
        if self._is_made:
            self.path.rmdir()

    def check_goes_on(self) -> None:
        """Check that this version of esjax makes the same updates as the version that began the run.

        Raises:
            EsjaxError: The updates differ, so the run cannot be resumed or replayed.
        """
        if self._format != FORMAT:
            raise EsjaxError(
                f"{str(self.path)!r} was trained by an earlier esjax, whose noise and updates differ (run folder of "
                f"format {self._format}, this is {FORMAT}), so it cannot be resumed or replayed; evaluate, generate, "
                "plot and export use its weights as they are"
            )

    def check_custom(self, given: Mapping[str, str], again: str, kinds: Sequence[str] = tuple(OPTIONS)) -> None:
        """Check that the custom parts of the run are given again, see the function `check_custom`."""
        check_custom(str(self.path), {kind: name for kind, name in self.custom.items() if kind in kinds}, given, again)

    def read_text_files(self) -> list[FileRecord]:
        """Return the files that the run's text was read from; none for a run of an earlier version.

        Raises:
            EsjaxError: The list is damaged.
        """
        try:
            lines = self._read(TEXT_FILES).splitlines() if (self.path / TEXT_FILES).exists() else []
            return [FileRecord(**json.loads(line)) for line in lines]
        except (TypeError, ValueError) as error:
            raise EsjaxError(f"{self.path / TEXT_FILES} is damaged: {error}; restore it from a copy") from error

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def ledger(self) -> Path:
        """File of the ledger."""
        return self.path / "ledger"

    @property
    def address(self) -> str | None:
        """Address of the run's coordinator; None if none runs. A killed coordinator leaves its last address."""
        return self._where()[0]

    @property
    def token(self) -> Path | None:
        """Token file with which a host joins there; None without keys, or if the coordinator made no token."""
        path = self._where()[1]
        return Path(path) if path else None

    def _where(self) -> tuple[str | None, str | None]:
        try:
            address, _, token = (self.path / "address").read_text(encoding="utf-8").partition("\n")
        except FileNotFoundError:
            return None, None
        except (OSError, UnicodeDecodeError) as error:
            raise EsjaxError(f"cannot read {self.path / 'address'}: {error}") from error
        return address or None, token.removesuffix("\n") or None  # a file name may hold a newline

    @contextmanager
    def keep_address(self, address: str, token: Path | None = None) -> Iterator[None]:
        """Record the address of the coordinator while the context is open.

        Args:
            address: Address at which the coordinator listens.
            token: Token file with which a host joins; None without keys, or if the coordinator made no token.

        Raises:
            EsjaxError: The file cannot be written.
        """
        path = self.path / "address"
        try:
            write_durably(path, f"{address}\n{token.resolve() if token else ''}\n")
        except OSError as error:
            raise EsjaxError(f"cannot write {path}: {error.strerror}") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def next_incarnation(self) -> int:
        """Count a start of the coordinator durably, and return its number, 1 for the first.

        Raises:
            EsjaxError: The file cannot be read or written.
        """
        path = self.path / "incarnation"
        try:
            kept = [file for file in (path, self.path / "epoch") if file.exists()]
            incarnation = 1 + max((int(file.read_text(encoding="utf-8")) for file in kept), default=0)
            write_durably(path, f"{incarnation}\n")
        except (OSError, ValueError) as error:
            raise EsjaxError(f"cannot count the coordinator's start in {str(path)!r}: {error}") from error
        return incarnation

    def lock(self) -> None:
        """Lock the run for this object, until the process ends or calls `unlock`; once more is no error.

        Raises:
            EsjaxError: Another process trains the run, or the folder cannot be written or locked.
        """
        if self._lock is not None:
            return
        try:
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise EsjaxError(f"cannot write the run folder {str(self.path)!r}: {error.strerror}") from error
        for left in reversed(range(LOCK_TRIES)):
            if try_lock(lock):
                break
            if not left:
                lock.close()
                raise EsjaxError(f"{str(self.path)!r} is being trained by another process; stop that one first")
            time.sleep(LOCK_PAUSE)
        self._lock = lock

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run, unless it is locked, and unlock it at the end; see `lock`."""
        self.lock()
        try:
            yield
        finally:
            self.unlock()

    def open_metrics(self, step: int, tell: Callable[[str], None]) -> IO[str]:
        """Open the metrics for appending, and drop the lines of steps after `step`, which will be done again.

        Args:
            step: Steps done.
            tell: Called with a line if lines of earlier steps are missing: they were torn or never written.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        there = {of: line for line in lines if 0 < (of := _step_of(line)) <= step}
        if len(there) < step:
            tell(f"{path} has no whole line for {step - len(there):,} of {step:,} steps; they stay left out")
        if lines:
            swap = path.with_suffix(".swap")
            swap.write_text("".join(line + "\n" for line in there.values()), encoding="utf-8")
            os.replace(swap, path)
        return path.open("a", encoding="utf-8", buffering=1)  # a killed run loses no line

    def keep_baselines(self, baselines: Mapping[str, float]) -> None:
        """Record the losses of the n-gram models, for plots and for evaluation.

        Args:
            baselines: Nats per token over the held-out documents, by n-gram model.

        Raises:
            EsjaxError: The file cannot be written.
        """
        path = self.path / "baselines.json"
        if not baselines or path.exists():
            return
        try:
            write_durably(path, json_line(baselines) + "\n")
        except OSError as error:
            raise EsjaxError(f"cannot write {path}: {error.strerror}") from error

    def keep_config(self) -> None:
        """Write the current settings.

        Raises:
            DiskError: The file cannot be written.
            EsjaxError: Another process trains the run.
        """
        path = self.path / "config.yaml"
        with self.locked(), writing(path):
            write_durably(path, to_yaml(self.config))

    def add_sample(self, step: int, text: str) -> None:
        """Append a text that the model wrote."""
        with (self.path / "samples.txt").open("a", encoding="utf-8") as samples:
            inside = re.sub("^--- step ", r"\\--- step ", text, flags=re.MULTILINE)  # no line of a text begins a sample
            samples.write(f"--- step {step}\n{inside}\n\n")

    def _read_vocabulary(self) -> Vocabulary:
        try:
            return parse_vocabulary(self._read_json("vocabulary.json"))
        except ValueError as error:
            raise EsjaxError(f"{self.path / 'vocabulary.json'} is damaged; restore it from a copy") from error

    def _read_code(self, run: Mapping[str, Any]) -> dict[str, Code]:
        try:
            return msgspec.convert(run.get("code", {}), dict[str, Code])
        except msgspec.ValidationError as error:
            raise EsjaxError(f"{self.path / RUN} is damaged: code: {error}; restore it from a copy") from error

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            if name != RUN and (self.path / RUN).exists():
                raise EsjaxError(f"{str(self.path)!r} is damaged: it has no {name}; restore it from a copy") from error
            inside = [str(path) for path in find_runs(self.path) if path != self.path]
            more = " and more" if len(inside) > MOST_NAMED else ""
            hint = f"; there {'is' if len(inside) == 1 else 'are'} {', '.join(inside[:MOST_NAMED])}{more}"
            raise EsjaxError(
                f"{str(self.path)!r} is not a run folder: it has no {name}{hint if inside else ''}"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise EsjaxError(f"cannot read {self.path / name}: {error}") from error

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self._read(name))
        except json.JSONDecodeError as error:
            raise EsjaxError(f"{self.path / name} is damaged: {error}; restore it from a copy") from error
        if not isinstance(value, dict):
            raise EsjaxError(f"{self.path / name} is damaged: it is no JSON object; restore it from a copy")
        return value


def check_custom(path: str, kept: Mapping[str, str], given: Mapping[str, str], again: str) -> None:
    """Check that the custom parts that weights were trained with are given again.

    Functions are compared by name, without their module; a lambda has no name, so any function matches it. Optimizers
    are compared by their parts, see `name_of_optimizer`; earlier runs kept only the type.

    Args:
        path: Path of the weights, for messages.
        kept: Names of the custom parts that the weights were trained with, by kind.
        given: Names of the custom parts given now, by kind.
        again: The function that takes them, for messages.

    Raises:
        EsjaxError: A part is missing, differs, or was not custom.
    """
    missing = [f"a custom {kind}, {name}" for kind, name in kept.items() if kind not in given]
    if missing:
        words = ", ".join(f"{kind}=..." for kind in kept)
        options = " ".join(f"{OPTIONS[kind]} PATH.py:FUNCTION" for kind in kept)
        raise EsjaxError(
            f"{path!r} was trained with {', and '.join(missing)}; give {'it' if len(missing) == 1 else 'them'} again: "
            f"{options}, or from Python {again}({path!r}, {words})"
        )
    for kind, name in given.items():
        if kind not in kept:
            raise EsjaxError(f"{path!r} was trained with the {kind} of its settings; leave {kind}= out")
        names = kept[kind], name
        if kind == "optimizer":
            is_other = all(MARK in one for one in names) and names[0] != names[1]
            was, now = names
        else:
            was, now = (one.rpartition(".")[2] for one in names)
            is_other = was != now and "<lambda>" not in (was, now)
        if is_other:
            raise EsjaxError(f"{path!r} was trained with the {kind} {was}, not {now}; give that one, or train anew")


def json_line(numbers: Mapping[str, float]) -> str:
    """Return named numbers as one line of JSON; NaN and infinity become null."""
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return json.dumps(finite, allow_nan=False)


def _step_of(line: str) -> float:
    """Return the step of a line of the metrics; infinity for a torn line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

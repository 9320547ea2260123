"""The folder of keys: the coordinator's key pair, the keys that are let in, and the token files of hosts.

    coordinator.json   the coordinator's key pair
    allowed.json       public keys that are let in, and the names of their tokens
    NAME.token         what a host needs to join; copy it there, readable by its owner alone

Keys are CURVE keys in Z85, 40 characters. Every file is readable by its owner alone and replaced as a whole.
"""

import fcntl
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import msgspec

from esjax.errors import EsjaxError
from esjax.runs.durable import write_durably

FORMAT = 1
"""Format version of the three kinds of file."""

FILE_LIMIT = 2**24
"""Most bytes of a file."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")

Key = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\Z")]


class Token(msgspec.Struct, frozen=True, tag="esjax token", tag_field="kind"):
    """A token: what a host needs to join."""

    format: int  # format version of the file
    name: str  # name by which the token is revoked
    address: str  # address of the coordinator, tcp://HOST:PORT
    server_key: Key  # the coordinator's public key
    public_key: Key  # the token's public key
    secret_key: Key  # the token's secret key, which lets a host join

    def __repr__(self) -> str:
        return f"Token(name={self.name!r}, address={self.address!r})"


class _Pair(msgspec.Struct, frozen=True, tag="esjax coordinator", tag_field="kind"):
    format: int
    public_key: Key
    secret_key: Key


class _Allowed(msgspec.Struct, frozen=True, tag="esjax allow-list", tag_field="kind"):
    format: int
    keys: dict[Key, str]


Stored = TypeVar("Stored", Token, _Pair, _Allowed)

# Made at import, not at first use: see the end of `esjax.config.settings`.
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (Token, _Pair, _Allowed)
}


class ServerKeys:
    """The keys of a coordinator, in one folder."""

    def __init__(
        self,
        folder: Path,
        new_keypair: Callable[[], tuple[str, str]],
        tell: Callable[[str], None],
        first_token: tuple[str, str] | None = None,
    ) -> None:
        """Open the folder; make it, and the coordinator's key pair, if they do not exist.

        Args:
            folder: The folder; only its owner may have access.
            new_keypair: Makes a public and a secret key.
            tell: Prints a line, from any thread, when the allow-list cannot be read; no host is let in then.
            first_token: Name and address of a token to make with a new key pair, see `new_token`. None: no token.

        Raises:
            EsjaxError: The folder or a file in it cannot be read or written, is open to others, or is damaged.
        """
        self._folder = folder
        self._new_keypair = new_keypair
        self._tell = tell
        _check_folder(folder, make=True)
        with self._locked():
            is_new = not self._path("coordinator.json").exists()
            if is_new:
                _write(self._path("coordinator.json"), _Pair(FORMAT, *new_keypair()))
            if not self._path("allowed.json").exists():
                _write(self._path("allowed.json"), _Allowed(FORMAT, {}))
            pair = _read(self._path("coordinator.json"), _Pair)
            self.public_key, self.secret_key = pair.public_key, pair.secret_key
            if is_new and first_token is not None:
                self._add_token(*first_token)
        self._known = (self._signature(), self._read_allowed())

    @property
    def allowed(self) -> Mapping[str, str]:
        """Public keys that are let in now, with the names of their tokens; never raises.

        May be called from any thread. It reads the file only after a change. While the folder or a file of the
        coordinator is open to others than its owner, no host is let in.
        """
        signature, allowed = self._known
        now = self._signature()
        if now != signature:
            try:
                allowed = self._read_allowed()
            except EsjaxError as error:
                allowed = MappingProxyType({})
                self._tell(f"no host is let in: {error}")
            self._known = (now, allowed)
        return allowed

    def new_token(self, name: str, address: str) -> Path:
        """Make a token, and let its key in.

        Args:
            name: Name of the token: up to 64 letters, digits, "-", "_" and ".".
            address: Address at which hosts reach the coordinator, tcp://HOST:PORT.

        Returns:
            The token file.

        Raises:
            EsjaxError: The name is taken or not valid, or the folder cannot be written.
        """
        with self._locked():
            return self._add_token(name, address)

    def _add_token(self, name: str, address: str) -> Path:
        path, allowed = self._token_path(name), self._read_allowed()
        if name in allowed.values() or path.exists():
            raise EsjaxError(f"there is a token {name!r} already; revoke it first, or give another name")
        public, secret = self._new_keypair()
        _write(path, Token(FORMAT, name, address, self.public_key, public, secret))
        _write(self._path("allowed.json"), _Allowed(FORMAT, {**allowed, public: name}))
        return path

    def revoke_token(self, name: str) -> None:
        """Revoke a token: its key is no longer let in, and its file is deleted.

        Raises:
            EsjaxError: There is no such token, or the folder cannot be written.
        """
        path = self._token_path(name)
        with self._locked():
            allowed = self._read_allowed()
            if name not in allowed.values() and not path.exists():
                names = ", ".join(sorted(allowed.values())) or "none"
                raise EsjaxError(f"there is no token {name!r}; there are: {names}")
            kept = {key: other for key, other in allowed.items() if other != name}
            _write(self._path("allowed.json"), _Allowed(FORMAT, kept))
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / name

    def _token_path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise EsjaxError(
                f"{name!r} cannot be the name of a token; give up to 64 letters, digits, '-', '_' and '.', and do not "
                "begin with '-' or '.'"
            )
        return self._path(f"{name}.token")

    def _signature(self) -> tuple[int, ...]:
        """Return a value that changes when the allow-list is replaced, or the folder or a file is opened to others."""
        try:
            found = self._path("allowed.json").stat()
            modes = [path.stat().st_mode for path in (self._folder, self._path("coordinator.json"))]
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode, *modes)

    def _read_allowed(self) -> Mapping[str, str]:
        _check_folder(self._folder)
        _read(self._path("coordinator.json"), _Pair)  # which is open to others, or not
        return MappingProxyType(_read(self._path("allowed.json"), _Allowed).keys)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from changing the folder until the block ends."""
        try:
            with self._path(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise EsjaxError(f"cannot write the folder of keys {str(self._folder)!r}: {error.strerror}") from error


def load_token(path: Path) -> Token:
    """Read a token file.

    Raises:
        EsjaxError: The file is missing, unreadable, open to others, not a token, or of another format version.
    """
    return _read(path, Token)


def _read(path: Path, kind: type[Stored]) -> Stored:
    what = kind.__struct_config__.tag
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > FILE_LIMIT:
            raise EsjaxError(f"{str(path)!r} is no {what}")
        _check_private(path, found, "600")
        content = path.read_bytes()
    except OSError as error:
        raise EsjaxError(f"cannot read the {what} {str(path)!r}: {error.strerror}") from error
    try:
        version = msgspec.json.decode(content, type=dict)["format"]
        if version != FORMAT:
            raise EsjaxError(f"{str(path)!r} is of format {version}, not {FORMAT}; use the esjax that made it")
        stored: Stored = _DECODERS[kind].decode(content)
        return stored
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
        raise EsjaxError(f"{str(path)!r} is no {what}, or damaged") from error


def _check_folder(folder: Path, make: bool = False) -> None:
    try:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder, folder.stat(), "700")
    except OSError as error:
        raise EsjaxError(f"cannot use the folder of keys {str(folder)!r}: {error.strerror}") from error


def _check_private(path: Path, found: os.stat_result, mode: str) -> None:
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise EsjaxError(
            f"{str(path)!r} is open to others than its owner; close it: chmod {mode} {shlex.quote(str(path))}"
        )


def _write(path: Path, content: Token | _Pair | _Allowed) -> None:
    """Replace a file as a whole and durably; only its owner can read it, from its first byte on."""
    write_durably(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n", mode=0o600)

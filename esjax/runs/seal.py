"""The seal of a checkpoint, `seal.json`: what the checkpoint must be, by hashes, and a hash of the seal itself.

A checkpoint is damaged if its seal cannot be read or has changed, or if its files do not match the hashes in the seal.
"""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import msgspec

from esjax.errors import EsjaxError
from esjax.runs.durable import LOST, write_durably

SEAL = "seal.json"
STATE = "state"

LIBRARIES = ("jax", "jaxlib", "numpy", "orbax-checkpoint", "tensorstore")
"""Packages that write and read the arrays."""


class Seal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in a checkpoint. Earlier seals lack the last fields; what is unset is not in the hash.

    Attributes:
        seconds: Training time at its step.
        member_tokens: Tokens scored up to its step, times members.
        leaves: Type and shape of each array of the state, by name.
        files: Hash of each file of the state, by path.
        digest: Digest of the state that was saved, see `esjax.runs.checkpoint.digest`; "" if it is unknown.
        versions: Versions of `LIBRARIES` that wrote it.
        hash: Hash of all other fields; "" if there is none.
        weights: Digest of the step, the parameters and their average, see `esjax.runs.checkpoint.Weights`.
        is_unconfirmed: Whether the state came from a host, and no other owner's host confirmed it.
    """

    seconds: float
    member_tokens: int
    leaves: dict[str, str]
    files: dict[str, str]
    digest: str = ""
    versions: dict[str, str] = {}
    hash: str = ""
    weights: str | msgspec.UnsetType = msgspec.UNSET
    is_unconfirmed: bool | msgspec.UnsetType = msgspec.UNSET

    def write(self, checkpoint: Path) -> None:
        """Write it, with its hash, into the folder of a checkpoint."""
        whole = msgspec.structs.replace(self, hash=self._hash())
        write_durably(checkpoint / SEAL, msgspec.json.encode(whole))

    @property
    def is_whole(self) -> bool:
        """Whether it is as it was written, as far as it can be known."""
        return self.hash in ("", self._hash())

    def _hash(self) -> str:
        return _hash(msgspec.json.encode(msgspec.structs.replace(self, hash="")))


def read_seal(checkpoint: Path) -> Seal:
    """Read the seal of a whole checkpoint."""
    return msgspec.json.decode((checkpoint / SEAL).read_bytes(), type=Seal)


def hash_files(folder: Path) -> dict[str, str]:
    """Hash every file in a folder; return the hashes by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _hash(path.read_bytes()) for path in files}


def find_damage(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint, or "" if it is whole.

    Raises:
        EsjaxError: The checkpoint cannot be examined and may be whole: no permission, too many open files, a network
            error.
    """
    try:
        seal = read_seal(checkpoint)
        found = hash_files(checkpoint / STATE)
    except OSError as error:
        if error.errno not in LOST:
            raise EsjaxError(f"cannot read the checkpoint {str(checkpoint)!r}: {error.strerror}") from error
        return f"it cannot be read: {error.strerror}"
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return f"its seal cannot be read: {' '.join(str(error).split())[:160]}"
    if not seal.is_whole:
        return "its seal has changed since it was written"
    changed = [name for name in sorted({*seal.files, *found}) if seal.files.get(name) != found.get(name)]
    return f"changed since it was written: {changed[0]}" if changed else ""


@cache
def versions() -> dict[str, str]:
    """Return the versions of `LIBRARIES` of this process."""
    return {name: version(name) for name in LIBRARIES}


def changed_versions(seal: Seal) -> str:
    """Name the libraries whose versions differ from those that wrote a checkpoint, with both versions."""
    now = versions()
    changed = [
        f"{name} {seal.versions[name]}, now {now[name]}"
        for name in seal.versions
        if seal.versions[name] != now.get(name)
    ]
    return "; ".join(changed) or "the versions of all libraries are the same"


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()

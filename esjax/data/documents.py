"""Documents of any size: kept in memory if they are small, else in temporary files that are mapped into memory.

The files have no name and vanish with the process. They lie in the folder of Python's `tempfile`, which TMPDIR names.
"""

import io
import math
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, overload

import numpy as np
from jaxtyping import Int32, Int64, Integer
from numpy import ndarray

from esjax.data.delivery import token_type
from esjax.data.tokens import STOP
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError

IN_MEMORY = 2**26
"""Most bytes of a store that are kept in memory."""


PIECE = 2**18
"""Bytes of text that are encoded at a time: few enough for a core's cache."""


SHARES = 32
"""Fewest documents that a part of many is made of, if there are so many."""


class Store:
    """Bytes that are written once, one after another, and then read."""

    def __init__(self) -> None:
        """Begin an empty store."""
        self._file: IO[bytes] = io.BytesIO()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def write(self, data: bytes | ndarray) -> None:
        """Add bytes, or those of an array.

        Raises:
            EsjaxError: The disk is full, or the folder for temporary files cannot be written.
        """
        data = data.tobytes() if isinstance(data, ndarray) else data
        try:
            if isinstance(self._file, io.BytesIO) and self._size + len(data) > IN_MEMORY:
                on_disk = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the store
                on_disk.write(self._file.getbuffer())
                self._file = on_disk
            self._file.write(data)
        except OSError as error:
            raise _no_room(error) from error
        self._size += len(data)

    def read(self) -> bytes | mmap.mmap:
        """Return all bytes. A file is mapped, so the system keeps in memory only what is used."""
        if isinstance(self._file, io.BytesIO):
            return self._file.getvalue()
        try:
            self._file.flush()
        except OSError as error:
            raise _no_room(error) from error
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, kind: Any) -> ndarray:
        """Return all bytes as an array of numbers of a type."""
        return np.frombuffer(self.read(), kind)


def _no_room(error: OSError) -> EsjaxError:
    return EsjaxError(
        f"cannot keep the text in {tempfile.tempdir!r}: {error.strerror}; let TMPDIR name a folder on a disk with room "
        "for twice the text"
    )


class TextStore(Store):
    """Documents in UTF-8, each with NUL behind it, which no document holds. `len` counts bytes."""

    def add(self, documents: Iterable[bytes]) -> None:
        """Add documents."""
        self.write(b"\0".join((*documents, b"")))

    def pieces(self) -> Iterator[bytes]:
        """Yield about `PIECE` bytes at a time: whole documents, each with NUL behind it."""
        content, begin = self.read(), 0
        while begin < len(content):
            end = content.find(b"\0", min(begin + PIECE, len(content) - 1)) + 1
            yield content[begin:end]
            begin = end


class Documents(Sequence[Int32[ndarray, "..."]]):
    """Encoded documents, one after another in one array.

    Attributes:
        stream: STOP, and then each document with STOP behind it, in the smallest type that holds the ids.
        ends: Place in `stream` of the STOP behind each document; a document may hold further ones.
    """

    def __init__(self, stream: Integer[ndarray, " length"], ends: Int64[ndarray, " documents"]) -> None:
        """Set up.

        Args:
            stream: See the class.
            ends: See the class.
        """
        self.stream, self.ends = stream, ends

    @property
    def tokens(self) -> int:
        """Number of tokens, the STOP of each document included."""
        return len(self.stream) - 1

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Int32[ndarray, "..."]: ...

    @overload
    def __getitem__(self, index: slice) -> list[Int32[ndarray, "..."]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """Return a document without its STOP, or a list of documents."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        begin = int(self.ends[place - 1]) + 1 if place else 1
        return self.stream[begin : int(self.ends[place])].astype(np.int32)

    def spread(self, limit: int) -> Sequence[Int32[ndarray, "..."]]:
        """Return all documents if they have at most `limit` tokens, else some, evenly spread, that have no more.

        A document gives at most its first `limit / SHARES` tokens, so that a few long ones leave room for the others.
        """
        if self.tokens <= limit:
            return self
        most = max(limit // SHARES, 1)
        lengths = np.minimum(np.diff(self.ends, prepend=0), most)
        step = max(float(lengths.sum()) / limit, 1.0)
        found = []
        for place in (np.arange(math.ceil(len(self) / step)) * step).astype(np.int64):
            if limit <= 0:
                break
            found.append(self[int(place)][: min(limit, most)])
            limit -= len(found[-1]) + 1
        return found


def encode_documents(texts: TextStore, vocabulary: Vocabulary) -> Documents:
    """Turn documents into tokens."""
    kind = token_type(vocabulary.size)
    tokens, ends = Store(), Store()
    tokens.write(np.array([STOP], kind))
    size = 1
    for piece in texts.pieces():
        ids, lengths = vocabulary.encode_piece(piece)
        tokens.write(ids.astype(kind, copy=False))
        ends.write(size + np.cumsum(lengths, dtype=np.int64) - 1)
        size += len(ids)
    return Documents(tokens.array(kind), ends.array(np.int64))

"""The objects of a remote output, asked again where a store stumbles; every failure is one line about its address.

Two clients: pyarrow's for ``s3://`` and ``gs://``, whose writes appear when they are complete, and fsspec's for the
rest, where a file is written under a temporary name and moved into place (the stores of ``_WHOLE`` need no move).
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import TypeVar

from clifflab.errors import OutputError, UserError
from clifflab.runtime.storage.arrow import ArrowClient
from clifflab.runtime.storage.client import Client
from clifflab.runtime.storage.fsspec import FsspecClient
from clifflab.scoring.filesystems import OUTPUT, denied, locate, of_store, reading, scheme_of

T = TypeVar("T")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before an operation is tried again
PATIENCE = 60.0  # seconds after which it is not
_WHOLE = ("abfs", "abfss", "az")  # a blob appears when its blocks are committed
_READ_ONLY = ("hf", "http", "https", "github", "zip", "data")
_HOPELESS = ("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist")


class Objects:
    """The objects below one address; every failure is one line about it.

    Args:
        address: Of the folder, without a credential.
        pauses: Seconds before each further try; by default :data:`PAUSES`.
        patience: Seconds after which nothing is tried again.

    Raises:
        OutputError: No filesystem is known for the address, or it can only be read.
    """

    def __init__(self, address: str, pauses: tuple[float, ...] | None = None, patience: float = PATIENCE) -> None:
        self.address, self._pauses, self._patience = address, PAUSES if pauses is None else pauses, patience
        if scheme_of(address) in _READ_ONLY:
            remedy = "choose a local folder, s3://BUCKET/..., gs://BUCKET/..., or another store that can be written"
            raise OutputError(OUTPUT, address, "can only be read", remedy)
        filesystem, base = locate(address, OUTPUT)
        handler = getattr(filesystem, "handler", None)
        self.client: Client = (
            ArrowClient(filesystem, base)
            if handler is None
            else FsspecClient(handler.fs, base, scheme_of(address) in _WHOLE)
        )

    def again(self, act: Callable[[Client], T]) -> T:
        """Do something, and again where the store stumbles.

        Raises:
            OutputError: It was refused, or did not work for longer than is waited.
        """
        start = time.monotonic()
        for pause in (*self._pauses, None):
            try:
                return act(self.client)
            except Exception as error:
                if isinstance(error, UserError) or not (isinstance(error, OSError) or of_store(error)):
                    raise
                hopeless = denied(error) or any(word in str(error) for word in _HOPELESS)
                if pause is None or hopeless or time.monotonic() - start > self._patience:
                    with reading(self.address, OUTPUT):
                        raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def read(self, place: str) -> bytes | None:
        """A small object; ``None`` where there is none."""

        def fetch(client: Client) -> bytes | None:
            sink = io.BytesIO()
            try:
                client.fetch(place, sink)
            except FileNotFoundError:
                return None
            return sink.getvalue()

        return self.again(fetch)

"""Sums over batches that outlive the process: a ranking that was killed goes on after its last batch."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..storage import write_tensors

FORMAT = "ecodiff.sums.1"
SECONDS = 20.0  # between two saves; longer where saving itself takes long


class Sums:
    """What a scoring method has summed up so far, in a file.

    Args:
        file: of one run, whose settings do not change; None: nothing is kept.
    """

    def __init__(self, file: Path | None = None):
        self.file, self._next = file, time.monotonic() + SECONDS

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """How many batches were kept, and their sums; (0, {}) without a file that can be read."""
        with suppress(OSError, SafetensorError, ValueError, KeyError):
            if self.file is not None and self.file.is_file():
                with safe_open(self.file, framework="pt") as stored:
                    header = stored.metadata() or {}
                    if header.get("format") == FORMAT:
                        names = list(stored.keys())
                        return int(header["batches"]), {name: stored.get_tensor(name) for name in names}
        return 0, {}

    def note(self, batches: int, sums: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep the sums of so many batches, if it is time to. A disk that is full loses work, not the run."""
        begun = time.monotonic()
        if self.file is None or begun < self._next:
            return
        with suppress(CheckpointError):
            write_tensors(self.file, sums(), {"format": FORMAT, "batches": str(batches)})
        self._next = time.monotonic() + max(SECONDS, 10 * (time.monotonic() - begun))

    def forget(self) -> None:
        """They are not needed any more."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

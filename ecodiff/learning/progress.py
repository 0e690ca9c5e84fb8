"""What a ranking in one long step has done so far, in files: one that was killed, or must pause, goes on.

Parts that may take long are kept one by one: sums over batches, bases, orders of layers, errors of orders.
Where time is limited (a call of ZeroGPU), a ranking pauses between two of them, so that none is lost.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..storage import write_json, write_tensors

FORMAT = "ecodiff.progress.2"
SUMS, CALLS = "sums", "calls.json"
SECONDS = 20.0  # between two saves of sums; longer where saving itself takes long


class Paused(Exception):  # noqa: N818 - not an error
    """The time of this call is up. What was done is kept, and the next call goes on."""


class Progress:
    """Parts of a ranking, by name.

    Args:
        folder: of one run, whose settings do not change; None: nothing is kept.
        seconds: that this call may take, of which one part at least is made; None: it is never paused.
    """

    def __init__(self, folder: Path | None = None, seconds: float | None = None):
        self.folder, self.seconds = folder, seconds
        self._begun = self._part_begun = time.monotonic()
        self._next, self._longest = self._begun + SECONDS, 0.0

    @property
    def pauses(self) -> bool:
        """True if it may pause: then what is only needed again is kept too."""
        return self.folder is not None and self.seconds is not None

    def file(self, name: str) -> Path | None:
        """Where a part is kept; None: nowhere."""
        return self.folder and self.folder / f"{name}.safetensors"

    def load(self, name: str) -> tuple[int, dict[str, Tensor]]:
        """A part and how far it is; (0, {}) if it was not kept, or cannot be read."""
        with suppress(OSError, SafetensorError, ValueError, KeyError):
            if (file := self.file(name)) is not None and file.is_file():
                with safe_open(file, framework="pt") as stored:
                    header = stored.metadata() or {}
                    if header.get("format") == FORMAT:
                        names = list(stored.keys())
                        return int(header["done"]), {key: stored.get_tensor(key) for key in names}
        return 0, {}

    def keep(self, name: str, tensors: Mapping[str, Tensor], done: int = 1) -> None:
        """Keep a part. A disk that is full loses work, not the run.

        Args:
            done: how far the part is: batches, or 1 if it is whole.

        Raises:
            Paused: it is kept, and another part would not end in time.
        """
        if (file := self.file(name)) is not None:
            with suppress(CheckpointError):
                write_tensors(file, tensors, {"format": FORMAT, "done": str(done)})
                self.pause()

    def note(self, batches: int, sums: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep the sums of so many batches, if it is time to. Raises Paused, as `keep`."""
        begun = time.monotonic()
        if begun < self._next and not self._over(begun):
            return
        self.keep(SUMS, sums(), batches)
        self._next = time.monotonic() + max(SECONDS, 10 * (time.monotonic() - begun))

    def pause(self) -> None:
        """After a part that is kept: raise Paused if another one would not end in time."""
        if self._over(time.monotonic()):
            raise Paused

    def _over(self, now: float) -> bool:
        """A part ended: True if another one, as long as the longest so far, would not end in time."""
        self._longest = max(self._longest, now - self._part_begun)
        self._part_begun = now
        return self.pauses and now - self._begun + 1.5 * self._longest > (self.seconds or 0)

    @property
    def calls(self) -> int:
        """Denoiser calls until it paused last, for saying how far it is."""
        with suppress(OSError, ValueError, TypeError):
            if self.folder is not None:
                return int(json.loads((self.folder / CALLS).read_text(encoding="utf-8")))
        return 0

    def paused(self, calls: int) -> None:
        """It pauses after so many denoiser calls in all."""
        if self.folder is not None:
            with suppress(CheckpointError):
                write_json(self.folder / CALLS, calls)

    def forget(self) -> None:
        """Nothing of it is needed any more."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

"""All runs under one folder."""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError, RunError
from . import examples
from .folder import Run

MIN_FREE_BYTES = 256 << 20


def store_root() -> Path:
    """Where runs live: $ECODIFF_HOME/runs, /data/ecodiff/runs on a Space with storage, or ~."""
    home = os.environ.get("ECODIFF_HOME")
    if home:
        return Path(home).expanduser() / "runs"
    if os.environ.get("SPACE_ID") and os.access("/data", os.W_OK):
        return Path("/data/ecodiff/runs")
    return Path.home() / ".cache" / "ecodiff" / "runs"


class RunStore:
    """All runs under one folder. An id is a secret: who has it may use the run."""

    def __init__(self, root: Path | None = None):
        self.root = Path(root or store_root())

    def new_folder(self) -> Path:
        """A folder for a new run, named by 128 random bits. Raises RunError if the disk is nearly full."""
        self.require_space()
        return self.root / secrets.token_hex(16)

    def require_space(self) -> None:
        """Raise RunError unless some disk is left: a run that cannot save what it learned is lost time."""
        with contextlib.suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.root).free
            if free < MIN_FREE_BYTES:
                raise RunError(
                    f"The disk is nearly full ({free >> 20} MiB left in {self.root}). Delete runs that are "
                    "not needed, then try again."
                )

    def open(self, run_id: str) -> Run:
        """The run of that id. Raises RunError if there is none (or the id is not one)."""
        if not (len(run_id) == 32 and set(run_id) <= set("0123456789abcdef")):
            raise RunError("This is not the id of a run.")
        with contextlib.suppress(OSError):
            examples.put(run_id, self.root)
        if not (self.root / run_id / "run.json").is_file():
            raise RunError("There is no such run any more. It may have expired.")
        return Run.open(self.root / run_id)

    def runs(self) -> Iterator[Run]:
        """All runs that can be read."""
        for file in self.root.glob("*/run.json"):
            with contextlib.suppress(RunError):
                yield Run.open(file.parent)

    def delete(self, run: Run) -> None:
        """Delete a run's folder. Raises CheckpointError if that fails."""
        try:
            shutil.rmtree(run.folder)
        except OSError as error:
            raise CheckpointError(f"Could not delete the run: {error}.") from None

    def sweep(self, max_age: float) -> int:
        """Delete runs, and recorded calls, that nothing was written to for `max_age` seconds.

        Returns how many.
        """
        removed = 0
        for folder in (*self.root.glob("*/run.json"), *self.root.glob("recordings/*/0.safetensors")):
            folder = folder.parent
            newest = max((f.stat().st_mtime for f in folder.glob("*")), default=time.time())
            if time.time() - newest > max_age:
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        return removed

"""What one process of the app shares: runs on disk, devices, the worker and timings."""

from pathlib import Path

from ..machine import Timings
from ..runs.store import RunStore
from .devices import Devices
from .worker import Worker


class Server:
    """Made once a process, by `build_demo` or at first use.

    Args:
        root: the folder of the runs; None: `runs.store.store_root`.
        devices: their names; None: `machine.devices`.
    """

    def __init__(self, root: Path | None = None, devices: list[str] | None = None):
        self.store = RunStore(root)
        self.timings = Timings(self.store.root / "pace.json")
        self.devices = Devices(self.store.root, self.timings, devices)
        self.worker = Worker(self.devices)


_current: Server | None = None


def server() -> Server:
    """The server of this process; ZeroGPU's workers are forked with it."""
    global _current
    if _current is None:
        _current = Server()
    return _current


def use(other: Server | None) -> None:
    """Let another server be this process's; None: a new one is made at next use."""
    global _current
    _current = other

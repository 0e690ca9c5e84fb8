"""What one visitor may take of a server that many share: a Space, or where ECODIFF_SHARED=1.

A visitor is told by a salted hash of the address that a request comes from: who hides behind many
addresses can take more, so a nearly full disk is refused besides (`RunStore.require_space`).
"""

import hashlib
import os
import secrets
from contextlib import suppress
from contextvars import ContextVar

from ..checkpoints.saving import folder_bytes
from ..errors import RunError
from ..runs.folder import Run
from .server import server

MAX_RUNS = 20

MAX_ACTIVE = 2  # that learn or wait for their turn

MAX_BYTES = 40 << 30  # of all files of their runs

_VISITOR: ContextVar[str] = ContextVar("visitor", default="")


def shared() -> bool:
    """True where visitors do not know each other."""
    return bool(os.environ.get("SPACE_ID")) or os.environ.get("ECODIFF_SHARED") == "1"


def come_from(address: str) -> None:
    """Note whom the request that is being answered comes from; "" for nobody in particular."""
    _VISITOR.set(_hashed(address) if address and shared() else "")


def _hashed(address: str) -> str:
    salt = server().store.root.parent / "salt"  # not among the runs, whose files are served
    if not salt.exists():
        salt.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), salt.open("x", encoding="utf-8") as file:
            file.write(secrets.token_hex(16))
    return hashlib.sha256((salt.read_text(encoding="utf-8") + address).encode()).hexdigest()[:16]


def admit(run: Run) -> None:
    """Note whose a new run is."""
    if visitor := _VISITOR.get():
        run.visitor = visitor
        run.save()


def require_room(learning: bool = False) -> None:
    """Raise RunError if the visitor has as many runs as one may have, or too much on the disk.

    Args:
        learning: the new run is to be learned.
    """
    own = _own()
    active = [run for run in own if (job := server().worker.job(run.id)) and job.active]
    if learning and len(active) >= MAX_ACTIVE:
        raise RunError(
            f"{len(active)} of your runs are learning or waiting already, which is as many as one visitor "
            "may have here. Wait for one of them, or stop it."
        )
    if len(own) >= MAX_RUNS:
        raise RunError(
            f"You have {len(own)} runs here, which is as many as one visitor may keep. Delete one in the "
            "Library, then try again."
        )
    require_bytes()


def require_bytes() -> None:
    """Raise RunError if the visitor's runs fill their share of the disk, or the disk is nearly full."""
    server().store.require_space()
    if sum(folder_bytes(run.folder) for run in _own()) >= MAX_BYTES:
        raise RunError(
            f"Your runs take more than the {MAX_BYTES >> 30} GB that one visitor may have here. Delete one "
            "in the Library, then try again."
        )


def _own() -> list[Run]:
    visitor = _VISITOR.get()
    return [run for run in server().store.runs() if run.visitor == visitor] if visitor else []

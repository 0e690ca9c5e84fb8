"""Whose rights the Hugging Face Hub is asked with while a model is opened, and how it fails to answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec

from ..errors import ModelNotFoundError

PROBE_SECONDS = 5  # that the Hub is waited for at first; its own client asks for most of a minute

# huggingface_hub 1 speaks HTTP with httpx, 2 with httpx2: their errors have no base in common.
NETWORK_ERRORS = tuple(import_module(name).HTTPError for name in ("httpx", "httpx2") if find_spec(name))

_TOKEN: ContextVar[str | None] = ContextVar("token", default=None)


def unreachable(source: str) -> ModelNotFoundError:
    """The error of a repository, or a file in one, that cannot be had."""
    return ModelNotFoundError(
        f"Could not get {source} from the Hugging Face Hub: no network, no such repository, or no "
        "access (a gated model needs its licence accepted and a token). Check the id and the "
        "connection, or give a folder on this machine."
    )


@contextmanager
def signed_in(token: str) -> Iterator[None]:
    """In this thread models are fetched with a token; "": with this machine's own, if it has one."""
    before = _TOKEN.set(token or None)
    try:
        yield
    finally:
        _TOKEN.reset(before)


def hub_token() -> str | None:
    """The token of who is signed in, as `huggingface_hub` takes it; None: this machine's own."""
    return _TOKEN.get()

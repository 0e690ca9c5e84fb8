"""Whose rights the Hugging Face Hub is asked with while a model is opened, and how it fails to answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec

# huggingface_hub 1 speaks HTTP with httpx, 2 with httpx2: their errors have no base in common.
NETWORK_ERRORS = tuple(import_module(name).HTTPError for name in ("httpx", "httpx2") if find_spec(name))

_TOKEN: ContextVar[str | None] = ContextVar("token", default=None)


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

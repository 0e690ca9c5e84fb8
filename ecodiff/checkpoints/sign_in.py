"""Whose rights the Hugging Face Hub is asked with while a model is opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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

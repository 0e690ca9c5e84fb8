"""What can go wrong, in words for the person who asked: what was wrong, what was expected, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class EcodiffError(Exception):
    """Base of every error that ecodiff raises on purpose. Its text is meant to be shown."""


class UnsupportedModelError(EcodiffError):
    """The model has nothing that ecodiff knows how to prune, or is not a diffusion pipeline."""


class ModelNotFoundError(EcodiffError):
    """No embedded model, folder or Hub repository of that name could be opened."""


class BudgetError(EcodiffError, ValueError):
    """The requested size is not a number in range, or is beyond what the model can give up."""


class PlanError(EcodiffError, ValueError):
    """A plan does not fit the model, or its file is not one."""


class CheckpointError(EcodiffError):
    """A file or folder is truncated, foreign, or could not be written."""


class RunError(EcodiffError):
    """A run does not exist, is in use, or belongs to another configuration."""


class LearningError(EcodiffError):
    """Learning cannot go on: values are not numbers. The last saved state is kept."""


class OutOfMemoryError(EcodiffError):
    """The device has less memory than was needed."""


def exhausted(error: Exception) -> bool:
    """True if an error says that memory ran out, on whatever device."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Raise OutOfMemoryError, with what to do, where memory runs out in here."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        raise OutOfMemoryError(f"The device ran out of memory. {advice}") from None

"""A module of its own: `spaces` takes the import lock in the fork, and the function must be there."""


def not_bad_fork() -> bool:
    """CUDA can be used in this fork, so it is said."""
    return False

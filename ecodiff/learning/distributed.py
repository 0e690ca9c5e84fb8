"""Learning in several processes (`accelerate launch`): each takes its share of every batch.

All hold the same state and draw the same gates; what they measure on their rows is averaged, so each
makes the same step. In a single process everything here is the identity.
"""

import os

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, reduce
from torch import Tensor, distributed

from ..errors import BudgetError


def join() -> None:
    """Join the others, if `accelerate launch` (or torchrun) started more than this process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        PartialState(cpu=True)  # by gloo, also on GPUs: what they tell each other is small


def leave() -> None:
    """Part from the others."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def count() -> int:
    """How many processes learn together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes files and speaks."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def share(batch: int) -> slice:
    """The rows of a batch that are this process's.

    Raises:
        BudgetError: the batch cannot be divided evenly.
    """
    if batch % count():
        raise BudgetError(f"A batch of {batch} cannot be shared evenly by {count()} processes.")
    each = batch // count()
    return slice(rank() * each, (rank() + 1) * each)


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, the same bits in each."""
    return reduce(tensor.cpu(), "mean").to(tensor.device) if count() > 1 else tensor


def whole(part: Tensor) -> Tensor:
    """All processes' parts of a batch, in order."""
    return gather(part.cpu().contiguous()).to(part.device) if count() > 1 else part


def agreed(value):
    """What the first process says."""
    return broadcast_object_list([value])[0] if count() > 1 else value

"""What can go wrong, in words for the person who asked: what was wrong, what was expected, what to do."""


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
    """Learning cannot go on (not a number, out of memory). The last saved state is kept."""

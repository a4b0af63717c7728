"""Every error a user can meet: one line that says what, where, with which numbers, and what to do now."""


class PruneLMError(Exception):
    """Root of all errors that are answers to the user, not faults of the program."""


class UnsupportedModelError(PruneLMError, ValueError):
    """The model's family, or a part of it, cannot be pruned here."""


class ArchitectureError(PruneLMError, ValueError):
    """An architecture file does not describe the model's real weights."""


class BudgetError(PruneLMError, ValueError):
    """The asked sparsity is no budget, or whole units cannot meet it."""


class RecipeError(PruneLMError, ValueError):
    """A recipe has an unknown key, a value of the wrong type, or does not exist."""


class UnknownPluginError(PruneLMError, LookupError):
    """No plug-in of that name is registered."""


class DataError(PruneLMError, ValueError):
    """A text cannot be read, or is too short for what was asked."""


class CalibrationError(PruneLMError, ArithmeticError):
    """Statistics are not finite or cannot determine what was asked of them."""


class CheckpointError(PruneLMError, OSError):
    """A model folder cannot be read, written, or proven."""


class OutputError(CheckpointError):
    """A file or folder cannot be written there, or another process is writing it."""


class DeviceError(PruneLMError, RuntimeError):
    """A device is not here, or its memory does not hold what was asked."""


class ProcessError(DeviceError):
    """Another process of a run on several was lost."""


class EvaluationError(PruneLMError, ArithmeticError):
    """A loss is not finite, or two models cannot be compared."""


class ResumeError(PruneLMError, ValueError):
    """Unfinished work cannot be gone on with: there is none, or it is of other inputs, another recipe or version."""


def comes_again(error: BaseException) -> bool:
    """Whether the same command would meet an error again; one of disk, device or memory, or an interrupt, may pass."""
    return isinstance(error, PruneLMError) and not isinstance(error, CheckpointError | DeviceError)

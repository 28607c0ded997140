"""The errors a user can cause.

    ExtendError
      RecipeError         a recipe or an option is wrong (also a ValueError)
      CheckpointError     a checkpoint, adapter or results file cannot be read or written
        SpaceError        the disk lacks the space; what is finished may be used again
        BusyError         another process is writing the same output
      CompatibilityError  two models do not fit together, or a model is not supported
      LayoutError         a length does not divide over the ranks of a layout (also a ValueError)
      DataError           training or evaluation text is missing, too short or malformed
      TrainingError       training cannot go on (loss not finite, ranks disagree, resume mismatch)
      RankError           another rank does not answer: it died, hangs, or is too slow
        SilentRankError   it gave no sign of life, and was ended
      ServerError         a server that is evaluated does not answer, or not what it was asked
      HubError            the Hugging Face Hub refuses, cannot be reached, or holds something else

Each message says what is wrong, both values, where, and what to do. The command line prints it
alone and exits with 1; `--debug` adds the traceback.
"""


class ExtendError(Exception):
    """Anything that the user can put right."""


class RecipeError(ExtendError, ValueError):
    """A recipe key, value or option is not accepted."""


class CheckpointError(ExtendError):
    """A file of a checkpoint or adapter is missing, damaged or cannot be written."""


class SpaceError(CheckpointError):
    """A disk without the space for what is to be written."""


class BusyError(CheckpointError):
    """An output that another process is writing."""


class CompatibilityError(ExtendError):
    """Models, adapters or hardware that do not fit together."""


class LayoutError(ExtendError, ValueError):
    """A sequence length that a ring layout cannot divide over its ranks."""


class DataError(ExtendError):
    """Text that is missing, too short or malformed."""


class TrainingError(ExtendError):
    """A training run that cannot go on."""


class RankError(ExtendError):
    """Another rank of a group that did not answer in time, or is gone."""


class SilentRankError(RankError):
    """A process of the launch has given no sign of life for too long, and was ended."""


class ServerError(ExtendError):
    """A server that does not answer, or that answers something else than it was asked."""


class HubError(ExtendError):
    """The Hub refuses what it is asked for, cannot be reached, or holds something else."""

"""The errors of Potstill. Each says what is wrong, what was found, and what to do.

The command line prints one of these as one clear line and exits with its `exit_code`; every other exception is our own mistake
and keeps its traceback.
"""


class PotstillError(Exception):
    """Root of the tree. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(PotstillError, ValueError):
    """The user asked for something that cannot be done; nothing large has been loaded."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or an override is wrong; the message names the key."""


class DataError(UsageError):
    """A data file is wrong; the message names the file and the line."""


class ModelError(UsageError):
    """A model or a tokenizer cannot be used; the message names its path."""


class IncompatibleError(UsageError):
    """Two parts do not fit together; the message names both sides."""


class RunFolderError(UsageError):
    """A run folder cannot be used: locked by another run, made by another recipe, or not writable."""


class CacheError(UsageError):
    """A cache of answers is not one, is in use, or was made from something else; the message names the field."""


class StorageError(PotstillError, OSError):
    """Bytes could not be written or do not read back as written; the message names the path."""


class ServerError(PotstillError):
    """A server that the run depends on refuses, or answers what cannot be believed; the message holds its own words.

    `status` is the HTTP status of a refusal.
    """

    status: int | None = None


class GeneratorError(ServerError):
    """A server that writes text refuses, has not taken the student's weights, or answers what cannot be believed."""


class TeacherError(ServerError):
    """A served teacher refuses, has become another model, or answers what cannot be believed; the message holds its own words."""


class OutageError(PotstillError, OSError):
    """A server that the run depends on is away for too long. Everything committed stays; the same command goes on later (EX_TEMPFAIL)."""

    exit_code = 75


class NonFiniteError(PotstillError, ArithmeticError):
    """A loss or a gradient is not finite; the weights are those from before the step."""


class InterruptedRun(PotstillError):
    """A signal asked the run to stop and everything up to the named step is committed."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number

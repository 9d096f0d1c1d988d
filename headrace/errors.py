"""The exception family, and the exit codes that go with it.

A `HeadraceError` is written for the person who reads it: what was wrong, where (file, line or key), what to do. The
command line prints it as one line and leaves with the class's `exit_code`; anything else that escapes is our bug and
keeps its traceback.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `headrace` command; launchers decide by them whether to restart."""

    DONE = 0
    USER_ERROR = 2
    DATA_ERROR = 3
    RECOVERABLE = 4
    WATCHDOG = 5


class HeadraceError(Exception):
    """Base of all errors meant for the user."""

    exit_code = ExitCode.USER_ERROR


class ConfigError(HeadraceError):
    """A configuration key, command-line value or file that cannot be used."""


class LayoutError(ConfigError):
    """A parallel layout that does not fit the model, the batch or the number of processes."""


class CheckpointError(HeadraceError):
    """A checkpoint that is missing, torn, or belongs to another model."""


class CheckpointPostponed(CheckpointError):
    """A checkpoint that could not be written or read just now, for a reason that may pass: storage that answers with an
    error, a process of it that was killed."""

    exit_code = ExitCode.RECOVERABLE


class BusyError(HeadraceError):
    """Something that another process is using; it may be free later."""

    exit_code = ExitCode.RECOVERABLE


class DataError(HeadraceError):
    """Training data that cannot be read, or whose share of rejects is past the source's limit."""

    exit_code = ExitCode.DATA_ERROR


class UnreachableError(HeadraceError):
    """A remote store that does not answer: nothing is wrong with the run, and trying again later may do."""

    exit_code = ExitCode.RECOVERABLE

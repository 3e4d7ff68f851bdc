"""The exceptions users see."""

import contextlib
from collections.abc import Iterator


class DgmrError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and how to mend it.

    The command line prints the sentence without a traceback and exits with ``status``.
    """

    status = 2


class Stopped(DgmrError):
    """A signal asked the work to stop; it has been saved, and the same command goes on with it."""

    status = 143
    """As a shell has it for SIGTERM."""


@contextlib.contextmanager
def told_of(where: str) -> Iterator[None]:
    """Put ``where``, a key of the params, in front of the sentence of a :class:`DgmrError`."""
    try:
        yield
    except DgmrError as error:
        raise DgmrError(f"{where}: {error}") from None

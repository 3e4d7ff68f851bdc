"""A progress bar with images/s and time left; a line now and then where the output is a file."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0
_LINE_BAR = 20


@contextmanager
def progress(
    what: str, total: int, unit: str = "images", done: int = 0, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show how far ``what`` has come, on standard error; call the given function with units done.

    ``done`` of the ``total`` were done before; of several processes one has it ``shown``.
    """
    if not shown:
        yield lambda _units: None
        return
    started, before = time.monotonic(), done

    def rate() -> float:
        return (done - before) / max(time.monotonic() - started, 1e-9)

    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.3g} " + unit + "/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, completed=done, rate=0.0)

            def advance(units: int) -> None:
                nonlocal done
                done += units
                bar.update(task, advance=units, rate=rate())

            yield advance
        return

    printed = started

    def advance_lines(units: int) -> None:
        nonlocal done, printed
        done += units
        now = time.monotonic()
        if now - printed >= _LINE_EVERY_S or done >= total:
            printed = now
            left = (total - done) / max(rate(), 1e-9)
            filled = _LINE_BAR * done // max(total, 1)
            line = (
                f"{what} [{'#' * filled}{'.' * (_LINE_BAR - filled)}] {done}/{total} {unit},"
                f" {rate():.3g} {unit}/s, {left:.0f} s left"
            )
            # Ctrl-C ends a tee that reads this; the work has still to be saved.
            with contextlib.suppress(BrokenPipeError):
                print(line, file=sys.stderr, flush=True)

    yield advance_lines

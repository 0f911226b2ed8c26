"""Progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ganclean.exceptions import missing_extra

Progress = Callable[[str, int, int], None]
"""Called with what is done, steps done, and steps in all."""


@contextmanager
def progress_bars(shown: bool) -> Iterator[Progress | None]:
    """Yield a callback of (what is done, steps done, steps in all) that draws a bar for each thing done."""
    if not shown:
        yield None
        return
    try:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
    except ImportError as error:
        raise missing_extra("rich", "cli") from error
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Bars(*columns, TimeRemainingColumn()) as bars:
        tasks = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield update

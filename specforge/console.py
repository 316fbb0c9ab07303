"""What commands print: lines, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specforge.errors import escaped

console = Console(highlight=False)


def say(text: str) -> None:
    """Print text that may quote files: no markup, emoji, control characters or added line breaks."""
    console.print(escaped(text), markup=False, emoji=False, soft_wrap=True)


def progress_bar(unit: str) -> Progress:
    """A progress bar; a task's ``rate`` field is shown after its counts."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def evaluation_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields the function to call with the number of decoded prompts and their total."""
    with progress_bar("prompts decoded") as bar:
        task = bar.add_task("evaluate", total=None, rate="")
        yield lambda done, total: bar.update(task, completed=done, total=total)

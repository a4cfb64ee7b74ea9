"""What the demos share: a bar on a terminal, a whole checkpoint where Ctrl-C ends a training, a table, a verdict."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..ops import files


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a training: what there was after its last whole epoch."""

    def __init__(self, checkpoint: dict[str, Any], epochs: int) -> None:
        super().__init__()
        self.checkpoint, self.epochs = checkpoint, epochs

    def save(self, path: Path) -> str:
        """Write the checkpoint, whole or not at all; the line that says so."""
        with files.whole(path) as part:
            torch.save(self.checkpoint, part)
        network, done = self.checkpoint["network"], self.checkpoint["epoch"]
        of = f" of {network!r}" if network else ""
        return f"interrupted; the state{of} after {done} of {self.epochs} epochs is in {path}"


def console_for(quiet: bool) -> Console:
    """Of a demo. There are bars where it is interactive: on a terminal, if nobody has asked for quiet."""
    return Console(force_interactive=False) if quiet else Console()


@contextmanager
def training(name: str, epochs: int, console: Console, shown: str, **parts: Any) -> Iterator[Callable[..., None]]:
    """A bar over epochs; what it gives is called after each, with the fields that ``shown`` prints.

    Args:
        shown: text beside the bar, "loss {task.fields[loss]:.3f}".
        parts: what has a ``state_dict``, under its key in a checkpoint: model, optimizer, schedule.

    Raises:
        Interrupted: for Ctrl-C within.
    """

    def state() -> dict[str, Any]:
        return {key: copy.deepcopy(part.state_dict()) for key, part in parts.items()}

    columns = (
        TextColumn(name or "training"),
        BarColumn(12),
        MofNCompleteColumn(),
        TextColumn(shown),
        TimeElapsedColumn(),
    )
    whole: dict[str, Any] = {"network": name.strip(), "epoch": 0, **state()}
    with Progress(*columns, console=console, disable=not console.is_interactive) as progress:
        bar = progress.add_task("", total=epochs, loss=float("nan"), accuracy=0.0)

        def epoch(**fields: Any) -> None:
            whole.update(state(), epoch=whole["epoch"] + 1)
            progress.update(bar, advance=1, **fields)

        try:
            yield epoch
        except KeyboardInterrupt:
            progress.stop()
            raise Interrupted(whole, epochs) from None


def compare(console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of networks: a name, and a figure for each heading."""
    table = Table(title=title, title_justify="left")
    table.add_column("network")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def verdict(console: Console, accuracy: float, bar: float, began: float) -> int:
    """0, or 1 if the held-out accuracy is below the bar; both are said, with the time since ``began``."""
    console.print(f"held-out accuracy: [bold]{accuracy:.4f}[/bold]", highlight=False)
    console.print(f"{time.perf_counter() - began:.0f} s in all", style="dim", highlight=False)
    if accuracy >= bar:
        return 0
    console.print(f"failed: expected a held-out accuracy of at least {bar}, got {accuracy:.4f}", style="red")
    return 1

"""What a training shows."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """A bar on a terminal, a line an epoch anywhere.

    Args:
        console: where to.
        epochs: of the training.
        total_steps: of the training.
        step: done already.
    """

    def __init__(self, console: Console, epochs: int, total_steps: int, step: int) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.console, self.epochs, self.total_steps = console, epochs, total_steps
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self.bar.add_task("training", total=total_steps, completed=step)

    def update(self, epoch: int, step: int, scalars: dict[str, float]) -> str:
        """Show the figures of an epoch so far; returns them as text."""
        text = f"epoch {epoch + 1}/{self.epochs}  loss {scalars['train/loss']:.3g}"
        if "train/oa" in scalars:  # pre-training has no labels
            text = f"epoch {epoch + 1}/{self.epochs}  loss {scalars['train/loss']:.3f}  acc {scalars['train/oa']:.1f} %"
        self.bar.update(self._task, completed=step, description=text)
        return text

    def end_epoch(self, epoch: int, step: int, scalars: dict[str, float], seconds: float) -> None:
        """Leave a line; ``seconds`` is what the ``step`` steps have taken."""
        text = self.update(epoch, step, scalars)
        val = f"  val {scalars['val/oa']:.1f} %" if "val/oa" in scalars else ""
        val = f"  val {scalars['val/loss']:.3g}" if "val/loss" in scalars and not val else val
        say(self.console, f"{text}{val}  {duration(seconds / step * (self.total_steps - step))} left")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is."""
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

"""The progress of a training on the console."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pointewa.tasks.base import Task


class TrainingProgress:
    """A bar on a terminal, and a line per epoch everywhere.

    Args:
        console: where to show it.
        task: whose metrics are shown.
        epochs: of the training.
        total_steps: of the training.
        step: number of steps already done.
    """

    def __init__(self, console: Console, task: Task, epochs: int, total_steps: int, step: int) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.console, self.task, self.epochs, self.total_steps = console, task, epochs, total_steps
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar_task = self.bar.add_task("training", total=total_steps, completed=step)

    def update(self, epoch: int, step: int, scalars: dict[str, float]) -> str:
        """Show the metrics of an epoch so far; returns them as text."""
        parts = [f"epoch {epoch + 1}/{self.epochs}", f"loss {scalars['train/loss']:.3g}"]
        for name in self.task.train_metrics:
            metric = self.task.metrics[name]
            parts.append(f"{metric.short or name} {metric.text(scalars[f'train/{name}'])}")
        self.bar.update(self._bar_task, completed=step, description="  ".join(parts))
        return "  ".join(parts)

    def end_epoch(self, epoch: int, step: int, scalars: dict[str, float], seconds: float) -> None:
        """Print a line; ``seconds`` is what the ``step`` steps have taken."""
        text, primary = self.update(epoch, step, scalars), self.task.primary()
        for split in ("val", "test"):
            if f"{split}/{primary}" in scalars:
                text += f"  {split} {self.task.metrics[primary].text(scalars[f'{split}/{primary}'])}"
        say(self.console, f"{text}  {duration(seconds / step * (self.total_steps - step))} left")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is."""
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

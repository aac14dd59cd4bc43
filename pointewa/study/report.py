"""The report of a study. Times have files of their own, so that the others are the same bytes every time."""

import csv
import io
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pointewa.errors import ConfigError, counted
from pointewa.safe.files import atomic_write
from pointewa.study.definition import Study
from pointewa.study.figures import Arm, Result, common_base, disagreement, gather, mixed_precision
from pointewa.study.plots import save_plots
from pointewa.study.statistics import mean_std

AID = """\
*How to read this.* Metrics are of the model after the last epoch, on the test split: mean ± sample standard deviation
over the seeds; accuracies are in percent. An arm is compared with its baseline seed by seed; *difference* is the mean
of these paired differences. If such studies were repeated, 95 of 100 of their intervals (Student's t) would contain the
true difference: an interval that contains 0 shows no difference, and with few seeds it is wide. p is that of the
two-sided paired t test; *p, Holm* is corrected for the number of arms. *Training loss* is the mean over the last
epoch's steps, with experts where there are any: an arm may fit better, generalise better, or both. Nothing was selected
on the test split: it is evaluated once a run, after the last epoch. *Best on validation* is the best of all epochs, and
so flatters every arm; no model was chosen by it."""


RESULTS = "results.csv"


def write_report(study: Study, out: Path, pdf: bool = False) -> list[Arm]:
    """Write README.md, results.csv, curves.csv, study.yaml, the pictures (with ``pdf`` also as PDF), and costs.

    Raises:
        ConfigError: no run is finished.
        CheckpointError: a damaged summary.
    """
    arms = gather(study)
    if not any(arm.runs for arm in arms):
        raise ConfigError(f"{study.folder}: no run of {study.path} is finished: there is nothing to report")
    pictures = save_plots(out, arms, pdf)
    texts = {
        RESULTS: csv_text(_result_row(result) for arm in arms for result in arm.runs),
        "curves.csv": csv_text(row for arm in arms for result in arm.runs for row in _curve_rows(result)),
        "costs.csv": csv_text(_cost_row(result) for arm in arms for result in arm.runs),
        "costs.md": _costs(study, arms),
        "study.yaml": study.text,
        "README.md": _readme(study, arms, pictures),
    }
    for name, text in texts.items():
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return arms


def check_place(out: Path, finished: int) -> None:
    """Refuse a folder whose content is worth more than a report of ``finished`` runs.

    Raises:
        ConfigError: it has the report of more runs, or a README.md that is no report.
    """
    try:
        rows = list(csv.reader(io.StringIO((out / RESULTS).read_text(encoding="utf-8", errors="replace"))))
    except FileNotFoundError as error:
        if (out / "README.md").exists():
            raise ConfigError(f"{out}: has a README.md that is no study's report: choose another folder") from error
        return
    if (there := len(rows) - 1) > finished:
        raise ConfigError(f"{out}: has the table of {there} finished runs, and this one would have {finished}: finish "
                          "more of them, publish elsewhere by --out, or remove that folder")  # fmt: skip


def table(arms: Sequence[Arm]) -> list[dict[str, str]]:
    """The figures of each arm as text; '-' where there are too few runs."""
    rows, base = [], common_base(arms)
    for arm in arms:
        figures, found, task = arm.figures(), arm.difference, arm.task
        primary = task.primary()
        form = task.metrics[primary].form
        last, best = (
            spread(figures[key], figures[f"{key}_std"], form) for key in (f"val_{primary}_last", f"val_{primary}_best")
        )
        tests = {
            f"test {metric.label}": spread(figures[f"test_{name}"], figures[f"test_{name}_std"], metric.form)
            for name, metric in task.metrics.items()
            if metric.headline
        }
        epochs = ", ".join(map(str, figures["val_best_epochs"]))
        no_difference = "baseline" if arm is arms[0] else "-"
        fit = arm.fit
        rows.append({
            "arm": arm.name,
            "seeds": str(len(arm.results)),
            **tests,
            **({} if base else {"compared with": arm.base or "-"}),
            f"difference to {base}" if base else "difference": f"{found.mean:+{form}}" if found else no_difference,
            "95 % interval": f"{found.low:+{form}} to {found.high:+{form}}" if found else "-",
            "p": p_text(figures["p"]),
            "p, Holm": p_text(figures["p_holm"]),
            "training loss": spread(figures["train_loss"], figures["train_loss_std"], ".4f"),
            "its difference": f"{fit.mean:+.4f} ({fit.low:+.4f} to {fit.high:+.4f})" if fit else no_difference,
            "validation, last epoch": last,
            "best on validation, epoch": f"{best} ({epochs})" if epochs else "-",
            "parameters in training": _count(figures["parameters_in_training"]),
            "at inference": _count(figures["parameters"]),
        })  # fmt: skip
    return rows


def p_text(p: float | None) -> str:
    """A p value as text; '-' without one."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _readme(study: Study, arms: Sequence[Arm], pictures: Sequence[str]) -> str:
    results = [result for arm in arms for result in arm.runs]
    finished = {result.run.name for result in results}
    missing = [run.name for run in study.runs if run.name not in finished]
    done = f"All {len(results)} runs are finished" if len(results) != 1 else "The only run is finished"
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if missing[6:] else "")
        done = f"{len(results)} of {counted(len(study.runs), 'run')} are finished; missing: {shown}"
    data = sorted({f"{result.summary['dataset']}, {counted(result.summary['epochs'], 'epoch')}" for result in results})
    machines = Counter(machine_of(result.summary) for result in results)
    commits = Counter(str(environment_of(result.summary).get("commit", "unknown")) for result in results)
    command = shlex.join(["python", "-m", "tools.study", str(study.path), *study.overrides])
    return "\n".join([
        f"# Study: {study.name}", "", *([study.description, ""] if study.description else []),
        f"{'; '.join(data)}. {done}.", "",
        *markdown(table(arms)), "", *_caution(arms), AID, "", *_of_folds(study, arms),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures), "",
        "```", command, "```", "",
        f"Commit {counted_texts(commits)}. Machine: {counted_texts(machines)}.", "",
        "`results.csv` has a line per run, `curves.csv` one per epoch of each run, `study.yaml` is the study; times",
        "and memory are in `costs.md` and `costs.csv`.", "",
    ])  # fmt: skip


def _of_folds(study: Study, arms: Sequence[Arm]) -> list[str]:
    """What a study with folds has besides: how they are averaged, and the primary metric on each of them."""
    if not study.fold_key:
        return []
    metric = arms[0].task.metrics[arms[0].task.primary()]
    rows = []
    for arm in arms:
        found = arm.by_fold()
        spreads = {fold: spread(*mean_std(found.get(fold, [])), metric.form) for fold in study.folds}
        rows.append({"arm": arm.name} | spreads)
    return [
        f"Each arm was trained once for each seed and each of the folds (`{study.fold_key}`) {', '.join(study.folds)}.",
        "The result of a seed is the mean over its folds, which all must be finished; all of the above is of these",
        "means, since the folds of a seed are no independent repetitions.", "",
        f"Test {metric.label} by fold, mean ± sample standard deviation over the seeds:", "",
        *markdown(rows), "",
    ]  # fmt: skip


def _caution(arms: Sequence[Arm]) -> list[str]:
    mixed = mixed_precision(arms)
    if not mixed:
        return []
    pairs = ", ".join(mixed[:4]) + (f" and {len(mixed) - 4} more" if mixed[4:] else "")
    return [
        f"**Caution: runs of different precision are compared: {pairs}.** Set `train.precision` and train them anew.",
        "",
    ]


def _costs(study: Study, arms: Sequence[Arm]) -> str:
    rows, base = [], common_base(arms) or "the baseline"
    for arm in arms:
        seconds = [result.summary["seconds"] for result in arm.results.values()]
        rows.append({
            "arm": arm.name,
            "seeds": str(len(seconds)),
            "seconds of training": spread(*mean_std(seconds), ".1f"),
            "peak memory, MB": spread(*mean_std(_known(arm, "peak_memory_mb")), ".0f"),
            "seconds of evaluating the test split": spread(*mean_std(_known(arm, "evaluation_seconds"))),
            f"relative to {base}": spread(*mean_std(arm.slower)) if arm is not arms[0] else "baseline",
        })  # fmt: skip
    return "\n".join([
        f"# Costs of the study {study.name}", "", *markdown(rows), "",
        "Mean ± sample standard deviation over the seeds; relative: of the ratios to the baseline's run of that seed.",
        *(["Of a seed with folds it is the mean of its runs."] if study.fold_key else []),
        "Parallel runs, or other work on the machine, make all of them slower. `costs.csv` has a line per run.", "",
    ])  # fmt: skip


def _known(arm: Arm, figure: str) -> list[float]:
    """A figure that some summaries of earlier versions lack."""
    return [result.summary[figure] for result in arm.results.values() if figure in result.summary]


def _place(result: Result) -> dict[str, Any]:
    run = result.run
    return {"arm": run.arm, **({"fold": run.fold} if run.fold else {}), "seed": run.seed}


def _result_row(result: Result) -> dict[str, Any]:
    summary, task, best = result.summary, result.task, result.val_best or (None, None)
    before = summary["test_before_folding"] or {}
    row = _place(result) | {"epochs": summary["epochs"]}
    row |= {f"test_{key}": summary["test"][key] for key in task.metrics}
    row |= {f"test_{key}_before_folding": before.get(key) for key, one in task.metrics.items() if one.headline}
    primary = task.primary()
    row |= {f"val_{primary}_last": result.val_last, f"val_{primary}_best": best[0], "val_best_epoch": best[1]}
    keys = ("parameters_in_training", "parameters", "largest_logit_difference", "skipped_steps", "precision")
    row |= {key: summary.get(key) for key in keys}
    return row | {
        key: environment_of(summary).get(key) for key in ("commit", "device", "threads", "torch", "ops", "platform")
    }


def _curve_rows(result: Result) -> Iterable[dict[str, Any]]:
    for epoch in result.epochs:
        row = _place(result) | {"epoch": epoch["epoch"] + 1}
        primary = result.task.primary()
        figures = {"train_loss": epoch.get("train/loss"), f"val_{primary}": epoch.get(f"val/{primary}"),
                   "disagreement": disagreement(epoch)}  # fmt: skip
        yield row | {key: value if value is None else f"{value:.6g}" for key, value in figures.items()}


def _cost_row(result: Result) -> dict[str, Any]:
    summary = result.summary
    row = _place(result) | {"seconds": summary["seconds"], "epochs": summary["epochs"]}
    row["seconds_an_epoch"] = f"{summary['seconds'] / summary['epochs']:.3f}"
    return row | {key: environment_of(summary).get(key) for key in ("device", "threads")}


def environment_of(summary: dict[str, Any]) -> dict[str, Any]:
    """Where a run was trained, of its summary."""
    found = summary.get("environment")
    return found if isinstance(found, dict) else {}


def machine_of(summary: dict[str, Any]) -> str:
    """Where a run was trained, for people."""
    found = environment_of(summary)
    device, threads, torch, ops, system = (
        found.get(key, "unknown") for key in ("device", "threads", "torch", "ops", "platform")
    )
    precision = summary.get("precision", "unknown")
    return f"{device} in {precision}, {threads} CPU threads, torch {torch}, operators of {ops}, {system}"


def counted_texts(texts: Counter[str]) -> str:
    """A single text as it is, several with the number of runs of each."""
    return (
        next(iter(texts))
        if len(texts) == 1
        else "; ".join(f"{text} ({counted(count, 'run')})" for text, count in texts.items())
    )


def spread(mean: float | None, std: float | None, form: str = ".2f") -> str:
    """Mean ± standard deviation as text; '-' without a mean."""
    if mean is None or math.isnan(mean):
        return "-"
    return f"{mean:{form}}" + ("" if std is None or math.isnan(std) else f" ± {std:{form}}")


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def markdown(rows: Sequence[dict[str, str]]) -> list[str]:
    """The lines of a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def csv_text(rows: Iterable[dict[str, Any]]) -> str:
    """The content of a CSV file."""
    rows, text = list(rows), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

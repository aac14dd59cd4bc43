"""The definition of a study: trainings of arms x seeds (x folds), from a file."""

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pointewa.config import Config, differences, find_config, load_config, read_yaml
from pointewa.errors import CheckpointError, ConfigError, first_line
from pointewa.runs.folder import find_run
from pointewa.runs.log import read_metrics
from pointewa.runs.summary import SUMMARY, read_summary
from pointewa.tasks import task_class, task_of
from pointewa.tasks.base import Task

KEYS = ("description", "configs", "settings", "arms", "seeds", "folds", "against")
# Settings of the machine: they change no result and are left out of the report.
MACHINE = ("data.root", "data.stream", "train.device", "train.save_every", "train.activation_checkpointing", "run.dir")


@dataclass(frozen=True)
class StudyRun:
    """A training of a study.

    Args:
        arm: its arm.
        seed: its seed.
        config: its configuration.
        arguments: that give tools.train this configuration.
        fold: its value of the study's ``folds``; empty in a study without.
    """

    arm: str
    seed: int
    config: Config = field(compare=False)  # cannot be hashed
    arguments: tuple[str, ...]
    fold: str = ""

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.config.run.name

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir) / self.name

    @property
    def log(self) -> Path:
        """The file of what the training prints."""
        return Path(self.config.run.dir) / f"{self.name}.log"

    def summary(self) -> dict[str, Any] | None:
        """The summary of the finished run; None for an unfinished one.

        Raises:
            CheckpointError: damaged.
        """
        summary = read_summary(self.folder)
        if summary is not None:
            task_of(summary, str(self.folder / SUMMARY))
        return summary

    def epochs(self) -> list[dict[str, float]]:
        """The scalars of each finished epoch, as far as they are readable."""
        try:
            return read_metrics(self.folder)
        except (CheckpointError, OSError):  # it has not begun
            return []


@dataclass(frozen=True)
class Study:
    """A study file, read and checked.

    Args:
        name: the file's stem.
        path: the file, as it was given.
        text: its content.
        description: its description of itself.
        arms: names; the first is the baseline.
        seeds: of each arm.
        task: the same for all runs.
        runs: seed by seed, and fold by fold, so that complete pairs come early.
        overrides: of the command line, without those of the machine.
        fold_key: the config key that the folds differ in; empty without folds.
        folds: its values; an arm trains with each of them for each of its seeds.
        against: the arms that are compared with another one than the first, and with which.
    """

    name: str
    path: Path
    text: str
    description: str
    arms: tuple[str, ...]
    seeds: dict[str, tuple[int, ...]]
    task: type[Task]
    runs: tuple[StudyRun, ...]
    overrides: tuple[str, ...]
    fold_key: str = ""
    folds: tuple[str, ...] = ("",)
    against: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the runs."""
        return self.runs[0].folder.parent


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and check each of its runs. Writes nothing.

    Args:
        path: YAML with ``arms`` (name: config keys; the first is the baseline), ``seeds``, and optionally ``configs``
            (files), ``settings`` (config keys of all arms), ``description``, ``folds`` (a config key: its values, over
            which the result of a seed is averaged), ``against`` (arms: the arm that each is compared with, in place of
            the first one). ``seeds`` is a list, or a mapping of arms to lists, with one for
            all others under ``default``.
        overrides: ``"group.key=value"`` for every run; ``run.dir`` is the parent of the study's folder.

    Raises:
        ConfigError: an unknown key, an arm's name that is not a valid folder name, a value that the configuration
            refuses, a run folder with another configuration.
    """
    path = find_config(path)
    content = OmegaConf.to_container(read_yaml(path))  # this reader understands 1e-3, and refuses duplicate keys
    if unknown := [key for key in content if key not in KEYS]:
        raise ConfigError(f"{path}: unknown key {_short(unknown[0])}: expected one of {', '.join(KEYS)}")
    description, configs, settings, arms, seeds, folds, against = (content.get(key) for key in KEYS)
    _expect(description is None or isinstance(description, str), path, "description", "text", description)
    configs = [] if configs is None else configs
    _expect(_all(configs, str), path, "configs", "a list of files, such as [configs/shapes.yaml]", configs)
    _expect(isinstance(arms, dict) and arms, path, "arms", "a mapping of names to config keys", arms)
    for name, where in [(path.stem, "the name of the study file")] + [(name, "arms") for name in arms]:
        usable = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,79}", name, re.ASCII)
        _expect(usable, path, where, "a name of letters, digits, '.', '_', '+', '-'", name)
    seeds_of = _seeds(seeds, arms, path)
    against = {} if against is None else against
    pairs = "a mapping of arms to other arms, such as {pretrained_ewa: pretrained}"
    _expect(isinstance(against, dict), path, "against", pairs, against)
    for arm, base in against.items():
        usable = isinstance(base, str) and {arm, base} <= arms.keys() and arm not in (base, next(iter(arms)))
        _expect(usable, path, f"against.{arm}", f"{pairs}, of which the first arm is not one", base)
    common = list(_flat(settings, path, "settings"))
    own = {arm: list(_flat(keys, path, f"arms.{arm}")) for arm, keys in arms.items()}
    fold_key, folds = _folds(folds, path)
    for key in [*common, *(key for mine in own.values() for key in mine), *overrides]:
        if fold_key and key.partition("=")[0] == fold_key:
            raise ConfigError(f"{path}: folds: {fold_key} is also set elsewhere (settings, arms or the command line): "
                              "leave it out there")  # fmt: skip
    root = runs_root(overrides)
    runs = tuple(
        _run(path, arm, seed, fold, configs, [*common, *own[arm], *overrides, *keys], f"{root}/{path.stem}")
        for seed in dict.fromkeys(seed for mine in seeds_of.values() for seed in mine)
        for fold in folds
        for keys in [[f"{fold_key}={json.dumps(fold)}"] if fold else []]
        for arm in arms
        if seed in seeds_of[arm]
    )
    firsts = list({run.arm: run for run in reversed(runs)}.values())[::-1]
    for number, run in enumerate(firsts):
        for other in firsts[:number]:
            if not differences(run.config, other.config, ["run.name", "train.seed"]):
                raise ConfigError(
                    f"{path}: arms.{run.arm}: the configuration is that of {other.arm}: the same run twice"
                )
    tasks = sorted({run.config.train.task for run in runs})
    _expect(len(tasks) == 1, path, "train.task", "one task, whose metrics the arms are compared by", tasks)
    reported = tuple(override for override in overrides if override.partition("=")[0] not in MACHINE)
    text = path.read_text(encoding="utf-8")
    return Study(
        path.stem,
        path,
        text,
        (description or "").strip(),
        tuple(arms),
        seeds_of,
        task_class(tasks[0]),
        runs,
        reported,
        fold_key,
        folds,
        against,
    )


def _seeds(seeds: Any, arms: Iterable[str], path: Path) -> dict[str, tuple[int, ...]]:
    """The seeds of each arm, from a list for all arms or a mapping."""
    lists = seeds if isinstance(seeds, dict) else {"default": seeds}
    if unknown := [name for name in lists if name not in (*arms, "default")]:
        _expect(False, path, "seeds", f"some of {', '.join(arms)}, and default", unknown[0])
    found = {}
    for arm in arms:
        where = "seeds" if lists is not seeds else f"seeds.{arm if arm in lists else 'default'}"
        mine = lists.get(arm, lists.get("default"))
        _expect(_all(mine, int) and mine, path, where, "a list of numbers, such as [0, 1, 2]", mine)
        _expect(len(set(mine)) == len(mine) and min(mine) >= 0, path, where, "different numbers from 0 on", mine)
        found[arm] = tuple(mine)
    return found


def _folds(folds: Any, path: Path) -> tuple[str, tuple[str, ...]]:
    """The config key of the folds, and its values."""
    if folds is None:
        return "", ("",)
    expected = "one config key with its values, such as {data.variant: [fold0, fold1]}"
    _expect(isinstance(folds, dict) and folds, path, "folds", expected, folds)
    flat = list(_flat(folds, path, "folds"))
    _expect(len(flat) == 1, path, "folds", expected, folds)
    key, _, values = flat[0].partition("=")
    values = json.loads(values)
    # No '-', which separates the parts of a run's name.
    usable = _all(values, str) and all(re.fullmatch(r"[A-Za-z0-9][\w.+]{0,79}", one, re.ASCII) for one in values)
    where = f"folds.{key}"
    _expect(usable and values, path, where, "a list of names of letters, digits, '.', '_', '+'", values)
    _expect(len(set(values)) == len(values), path, where, "different values", values)
    return key, tuple(values)


def time_left(runs: Iterable[StudyRun], parallel: int = 1) -> float | None:
    """Seconds that the runs will still take, estimated from the finished epochs; None while there are none.

    Args:
        runs: of a study, finished ones included.
        parallel: how many train at a time.
    """
    took: dict[str, list[float]] = {}
    left: list[tuple[str, int]] = []
    for run in runs:
        epochs = run.epochs()
        seconds = epochs[-1].get("seconds") if epochs else None
        if isinstance(seconds, int | float):
            took.setdefault(run.arm, []).append(seconds / len(epochs))
        left.append((run.arm, max(run.config.train.epochs - len(epochs), 0)))
    if not took:
        return None
    means = {arm: sum(seconds) / len(seconds) for arm, seconds in took.items()}
    other = sum(means.values()) / len(means)  # for arms that have not finished an epoch
    return sum(means.get(arm, other) * count for arm, count in left) / parallel


def _run(path: Path, arm: str, seed: int, fold: str, configs: list[str], overrides: list[str], folder: str) -> StudyRun:
    where = f"{path}: arms.{arm}, seed {seed}" + (f", {fold}" if fold else "")
    name = f"{arm}-{fold}-seed{seed}" if fold else f"{arm}-seed{seed}"
    return replace(make_run(where, arm, seed, name, configs, overrides, folder, f"rename {path}"), fold=fold)


def make_run(
    where: str,
    arm: str,
    seed: int,
    name: str,
    configs: Sequence[str],
    overrides: Iterable[str],
    folder: str,
    else_: str,
) -> StudyRun:
    """A training of a study, its configuration and what is in its folder checked. Writes nothing.

    Args:
        where: for messages.
        arm, seed: see `StudyRun`.
        name: of its folder in ``folder``.
        configs, overrides: of its configuration.
        folder: of the study.
        else_: what helps beside removing the run's folder.

    Raises:
        ConfigError: a value that the configuration refuses, a run folder with another configuration.
    """
    keys = [
        *overrides,
        f"train.seed={seed}",
        f"run.dir={json.dumps(folder)}",
        f"run.name={json.dumps(name)}",
        "run.report=false",  # the study has its own report
    ]
    try:
        config = load_config(configs, keys)
        task_class(config.train.task)(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('command line: ')}") from error
    try:
        find_run(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}\nIn a study: remove {folder}/{name}, or {else_}") from error
    return StudyRun(arm, seed, config, tuple([*(f"--config={file}" for file in configs), *keys]))


def runs_root(overrides: Sequence[str]) -> str:
    """The parent of a study's folder, by ``run.dir`` among the overrides.

    Raises:
        ConfigError: a key among them that the study sets itself.
    """
    root = load_config().run.dir
    for override in overrides:
        key = override.partition("=")[0]
        if key == "train.seed" or (key.split(".")[0] == "run" and key != "run.dir"):
            raise ConfigError(f"{key}: the study sets it for each of its runs: leave it out")
        if key == "run.dir":
            root = load_config(overrides=[override]).run.dir
    return root


def _flat(keys: Any, path: Path, where: str) -> Iterator[str]:
    """Nested config keys as overrides, with values in JSON, which is YAML on one line."""
    _expect(keys is None or isinstance(keys, dict), path, where, "a mapping of config keys", keys)
    for group, values in (keys or {}).items():
        pairs = [(f"{group}.{key}", value) for key, value in values.items()] if isinstance(values, dict) else []
        for key, value in pairs if isinstance(values, dict) else [(str(group), values)]:
            if key == "train.seed" or key.split(".")[0] == "run":
                raise ConfigError(f"{path}: {where}: {key}: the study sets it for each of its runs: leave it out")
            try:
                yield f"{key}={json.dumps(value)}"
            except (TypeError, ValueError) as error:  # a date, or a mapping with dates for keys
                raise ConfigError(f"{path}: {where}: {key}: {first_line(error)}") from error


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in values)


def _expect(fine: Any, path: Path, key: str, expected: str, found: Any) -> None:
    if not fine:
        raise ConfigError(f"{path}: {key}: expected {expected}, found {_short(found)}")


def _short(value: Any) -> str:
    return "nothing" if value is None else reprlib.repr(value)

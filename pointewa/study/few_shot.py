"""Few-shot classification as a study: arms x settings x folds."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pointewa.config import load_config
from pointewa.errors import ConfigError
from pointewa.study.definition import MACHINE, Study, StudyRun, make_run, runs_root
from pointewa.tasks import task_class

RECIPE = "configs/task/few_shot.yaml"
SETTINGS = ("5w10s", "5w20s", "10w10s", "10w20s")  # of the published protocol
FOLDS = 10
WARMUP = 1 / 15  # of the epochs: 10 of 150
# The arms, and whether they start from a pre-training and are trained with EWA. The first is the baseline.
ARMS = {"scratch": (False, False), "scratch-ewa": (False, True), "pretrained": (True, False),
        "pretrained-ewa": (True, True)}  # fmt: skip
_OPTIONAL = "scratch-ewa"  # trained where it is asked for
_OWN = ("data.way", "data.shot", "data.fold", "ewa.enabled", "train.init_from", "train.task")


@dataclass(frozen=True)
class FewShot:
    """The runs of a few-shot table.

    Args:
        study: all runs, its arms being those of each setting, such as "5w10s-scratch"; a run's seed is its fold.
        settings: of the table, such as "5w10s".
        arms: of `ARMS`: those that are to be trained, and those that have runs.
        left_out: arms that have runs, and are not in ``arms`` since it was not said what they start from.
        folds: how many.
        command: that makes it, without keys of the machine.
    """

    study: Study
    settings: tuple[str, ...]
    arms: tuple[str, ...]
    left_out: tuple[str, ...]
    folds: int
    command: tuple[str, ...]

    def runs(self, arms: Iterable[str]) -> list[StudyRun]:
        """The runs of some arms."""
        return [run for run in self.study.runs if run.arm.split("-", 1)[1] in arms]


def default_arms(init_from: str | None) -> tuple[str, ...]:
    """The arms that are trained unless others are named: from scratch, and from a pre-training if there is one."""
    return tuple(arm for arm, (pretrained, _) in ARMS.items() if arm != _OPTIONAL and (init_from or not pretrained))


def parse_setting(text: str) -> tuple[int, int]:
    """Way and shot of a setting such as "5w10s".

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"([1-9]\d{0,3})w([1-9]\d{0,3})s", text)
    if not found:
        raise ConfigError(f"--settings: expected some such as {' '.join(SETTINGS)}, found {text!r}")
    return int(found[1]), int(found[2])


def load_few_shot(
    configs: Sequence[str],
    overrides: Sequence[str] = (),
    init_from: str | None = None,
    settings: Sequence[str] = SETTINGS,
    folds: int = FOLDS,
    name: str | None = None,
    only: Sequence[str] | None = None,
    steps: int | None = None,
) -> FewShot:
    """The runs of a few-shot table, their configurations checked. Writes nothing.

    Args:
        configs: files; the first is the data set's, on which the recipe stands.
        overrides: ``"group.key=value"`` for every run; ``run.dir`` is the parent of the folder of the runs.
        init_from: what the arms "pretrained" start from; None for the arms from scratch only.
        settings: see `parse_setting`.
        folds: how many, from fold 0 on.
        name: of the folder of the runs; None: of the data set and the model.
        only: the arms to train, in place of `default_arms`; those that have runs are there anyway.
        steps: optimizer steps of a run, at least, in place of the recipe's epochs.

    Raises:
        ConfigError: an arm that is not known or lacks ``init_from``, a value that the configuration refuses, a key that
            the arms set, a run folder with another configuration.
    """
    for arm in only or ():
        if arm not in ARMS:
            raise ConfigError(f"--only: expected some of {', '.join(ARMS)}, found {arm!r}")
        if ARMS[arm][0] and not init_from:
            raise ConfigError(f"--only: {arm} needs a pre-training: say which by --init-from (CKPT=runs/x)")
    files = [*configs[:1], RECIPE, *configs[1:]]
    keys = [override.partition("=")[0] for override in overrides]
    if own := next((key for key in keys if key in _OWN), None):
        raise ConfigError(f"{own}: few-shot sets it for each of its runs: leave it out")
    root = runs_root(overrides)
    if steps and "train.epochs" in keys:
        raise ConfigError("--steps: they decide the epochs, and train.epochs is given: leave one of them out")
    given = load_config(configs, overrides)  # without the recipe
    if given.data.fold is not None or given.train.init_from:
        key = "data.fold" if given.data.fold is not None else "train.init_from"
        raise ConfigError(f"{key}: few-shot sets it for each of its runs, and a file of --config does: leave it out")
    config, train = load_config(files, [*overrides, "train.warmup_epochs=null"]), given.train
    own_warmup = train.warmup_epochs is not None or train.warmup_fraction is not None
    task = task_class(config.train.task)
    if not task.predicts_classes:
        raise ConfigError(f"train.task: few-shot is of classification, found {config.train.task}: leave it out")
    name = name or f"few_shot-{config.data.name}-{config.model.preset.replace(':', '-')}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,79}", name, re.ASCII):
        raise ConfigError(f"--name: expected a name of letters, digits, '.', '_', '+', '-', found {name!r}")
    sizes = {setting: parse_setting(setting) for setting in settings}
    lengths = {}
    for setting, (way, shot) in sizes.items():
        a_epoch = max(way * shot // config.train.batch_size, 1)
        epochs = -(-steps // a_epoch) if steps else config.train.epochs
        lengths[setting] = [f"train.epochs={epochs}"] if steps else []
        warmup = json.dumps(train.warmup_epochs) if own_warmup else f"{epochs * WARMUP:.6g}"
        lengths[setting] += [f"train.warmup_epochs={warmup}"]
    there = {arm for arm in ARMS if any(Path(root, name).glob(f"*s-{arm}-fold*/"))}
    left_out = tuple(arm for arm in ARMS if arm in there and ARMS[arm][0] and not init_from)
    wanted = {*(default_arms(init_from) if only is None else only), *there}
    arms = tuple(arm for arm in ARMS if arm in wanted and arm not in left_out)
    if not arms:
        raise ConfigError(f"{root}/{name}: has no runs to report on")
    runs = tuple(
        make_run(
            f"{arm}, {setting}, fold {fold}",
            f"{setting}-{arm}",
            fold,  # also the seed, so that the folds are trained independently of each other
            f"{setting}-{arm}-fold{fold}",
            files,
            [
                *lengths[setting],
                *overrides,
                f"data.way={way}",
                f"data.shot={shot}",
                f"data.fold={fold}",
                *_keys(arm, init_from),
            ],
            f"{root}/{name}",
            "choose another name for this table (RUN=x, --name x)",
        )
        for fold in range(folds)
        for setting, (way, shot) in sizes.items()
        for arm in arms
    )
    names = tuple(f"{setting}-{arm}" for setting in sizes for arm in arms)
    reported = tuple(one for one in overrides if one.partition("=")[0] not in MACHINE)
    seeds = dict.fromkeys(names, tuple(range(folds)))
    study = Study(name, Path(name), "", "", names, seeds, task, runs, reported)
    command = ["python", "-m", "tools.few_shot", *(f"--config={file}" for file in configs), f"--name={name}"]
    command += [f"--init-from={init_from}"] if init_from else []
    command += ["--only", *arms] if set(arms) != set(default_arms(init_from)) else []
    command += ["--settings", *sizes, f"--folds={folds}", *([f"--steps={steps}"] if steps else []), *reported]
    return FewShot(study, tuple(sizes), arms, left_out, folds, tuple(command))


def _keys(arm: str, init_from: str | None) -> Iterator[str]:
    pretrained, averaged = ARMS[arm]
    yield f"ewa.enabled={str(averaged).lower()}"
    if pretrained:
        yield f"train.init_from={json.dumps(init_from)}"

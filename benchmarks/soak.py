"""Kill trainings again and again, resume them, and compare the result bit for bit with an undisturbed training.

python -m benchmarks.soak --kills 30
python -m benchmarks.soak --kills 6 --scenario ewa "ewa, 2 processes"
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from signal import Signals
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table

from pointewa.errors import CheckpointError
from pointewa.runs.folder import CONFIG
from pointewa.runs.log import METRICS
from pointewa.runs.summary import SUMMARY
from pointewa.runs.weights import LAST, MODEL, PREVIOUS
from pointewa.safe.files import atomic_write
from pointewa.safe.torch_files import read_state
from pointewa.tools import cli
from pointewa.train.device import commit, cpu_name

KINDS = (Signals.SIGKILL, Signals.SIGTERM, Signals.SIGINT)
EPOCHS_A_KILL = 4  # so that the waits, whose first seconds go into the start, reach well into the training
TRAINING, PATIENCE, GRACE = 3600, 120, 10  # seconds: for a training, to end after a signal, for its children then

# The whole path in a few seconds, many of them spent on writing checkpoints, so that kills hit that too.
TINY = (
    "model.width=24", "model.depth=4", "model.heads=2", "model.num_groups=8", "model.group_size=8",
    "data.num_points=128", "train.batch_size=16", "train.device=cpu", "train.lr=2e-3", "train.save_every=2",
    "run.report=false",
)  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """A way to train: overrides of the configuration, and how many processes."""

    name: str
    overrides: tuple[str, ...] = ()
    processes: int = 1

    def command(self, folder: Path, epochs: int) -> list[str]:
        """The command line that trains in a folder, or resumes there."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        keys = [*TINY, f"train.epochs={epochs}", f"run.dir={folder.parent}", f"run.name={folder.name}", *self.overrides]
        # A shell's background job ignores SIGINT, and so would what it starts.
        return ["env", "--default-signal=INT", sys.executable, *(torchrun if self.processes > 1 else []),
                "-m", "tools.train", "--config", "configs/shapes.yaml", *keys]  # fmt: skip


SCENARIOS = {scenario.name: scenario for scenario in (
    Scenario("dense", ("ewa.enabled=false",)),
    Scenario("ewa"),
    Scenario("ewa, accumulation", ("train.accumulate=2",)),
    Scenario("ewa, activation checkpointing, val split",
             ("train.activation_checkpointing=true", "data.val_fraction=0.2")),
    Scenario("ewa, 2 processes", processes=2),
)}  # fmt: skip


@dataclass
class Attempt:
    """A start of the command, and its result."""

    before: int  # steps in the checkpoint that it found
    signal: str = ""  # that it received; none if it ended before
    seconds: float = 0.0  # from its start to the signal, or to its end
    code: int = 0  # exit code, as a shell reports it
    after: int = 0  # steps in the checkpoint that it left
    done: bool = False  # it left a finished run
    torn: bool = False  # it left a half-written file, under a temporary name
    resumed: bool = False  # it reported that it resumes from a checkpoint
    previous: bool = False  # it reported that it took the one before the last
    faults: list[str] = field(default_factory=list)  # whatever is wrong with it

    @property
    def killed(self) -> bool:
        """Whether the signal came in time."""
        return bool(self.signal) and not self.done


@dataclass
class Outcome:
    """The result of a scenario."""

    scenario: str
    epochs: int
    attempts: list[Attempt] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """Differences and faults, as lines."""
        faults = [fault for attempt in self.attempts for fault in attempt.faults]
        return [f"{self.scenario}: {text}" for text in self.differences + faults]

    @property
    def row(self) -> dict[str, str]:
        """Figures for the table."""
        kills = [attempt for attempt in self.attempts if attempt.killed]
        figures = {kind.name: sum(kill.signal == kind.name for kill in kills) for kind in KINDS} | {
            "in training": sum(kill.after > kill.before for kill in kills),
            "writing": sum(kill.torn for kill in kills),
            "resumed": sum(attempt.resumed for attempt in self.attempts),
            "from previous": sum(attempt.previous for attempt in self.attempts),
            "seconds": round(self.seconds),
            "identical": "no" if self.differences else "yes",
        }
        return {"scenario": self.scenario} | {name: str(value) for name, value in figures.items()}


def saved_steps(folder: Path) -> int:
    """Steps in the checkpoint that a run would resume from; 0 without one."""
    for name in (LAST, PREVIOUS):
        with suppress(CheckpointError):
            return read_state(folder / name)["step"]
    return 0


def processes_of(token: str) -> list[int]:
    """Processes with ``token`` in their environment: torchrun gives each of its children a session of its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            found += [int(path.parent.name)] if token.encode() in path.read_bytes() else []
    return found


def start(
    scenario: Scenario, folder: Path, epochs: int, rng: random.Random, kind: Signals | None = None, wait: float = 0.0
) -> Attempt:
    """Start the training in a folder, and unless ``kind`` is None send it that signal after ``wait`` seconds."""
    result, token, started = Attempt(saved_steps(folder)), uuid.uuid4().hex, time.perf_counter()
    settings = {"OMP_NUM_THREADS": "1"} | os.environ | {"POINTEWA_SOAK": token}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            scenario.command(folder, epochs), stdout=output, stderr=output, env=settings, start_new_session=True
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(wait if kind else TRAINING)
            result.seconds = round(time.perf_counter() - started, 3)
            if kind and process.poll() is None:
                result.signal = kind.name
                _send(kind, process.pid, scenario.processes > 1, token, rng)
            process.wait(PATIENCE)
            until = time.perf_counter() + GRACE
            while processes_of(token) and time.perf_counter() < until:
                time.sleep(0.05)
        except subprocess.TimeoutExpired:
            result.faults.append(f"it did not end, {result.signal or 'without a signal'}")
        finally:
            if stayed := processes_of(token):
                result.faults.append(f"{len(stayed)} processes stayed behind, {result.signal or 'without a signal'}")
            while stayed := processes_of(token):
                for number in stayed:
                    _kill(number, Signals.SIGKILL)
                time.sleep(0.05)
        output.seek(0)
        text = output.read().decode(errors="replace")
    code = process.wait()
    result.code = code if code >= 0 else 128 - code
    result.after, result.done = saved_steps(folder), (folder / SUMMARY).exists()
    result.torn = any(folder.glob(".*.tmp"))
    result.resumed, result.previous = "resuming" in text, f"taking {PREVIOUS}" in text
    result.faults += judge(result, text, exact=scenario.processes == 1)
    return result


def _send(kind: Signals, process: int, torchrun: bool, token: str, rng: random.Random) -> None:
    if torchrun and kind == Signals.SIGKILL:  # to one that trains, or to torchrun where it has not started them yet
        _kill(rng.choice([number for number in processes_of(token) if number != process] or [process]), kind)
    else:  # to the process, or to torchrun's whole group, as a terminal does it
        _kill(process, kind, rng.choice([os.kill, os.killpg]) if torchrun else os.kill)


def _kill(process: int, kind: Signals, kill: Callable[[int, int], None] = os.kill) -> None:
    with suppress(ProcessLookupError):  # it has just ended by itself
        kill(process, kind)


def judge(attempt: Attempt, text: str, exact: bool = True) -> list[str]:
    """What is wrong with an attempt that printed ``text``; only with ``exact`` a signal has an exit code of its own."""
    faults, name, end = [], attempt.signal or "no signal", " / ".join(text.split("\n")[-4:])
    expected = [0] if attempt.done else []
    expected += [128 + Signals[attempt.signal]] if attempt.signal else []
    right = attempt.code in expected if exact or not attempt.signal else attempt.code or attempt.done
    if not right:
        faults.append(f"exit code {attempt.code} after {name}, done: {attempt.done}: {end}")
    # Once it has trained it says how to resume; during its start there is nothing to say.
    told = not attempt.killed or name == "SIGKILL" or "resume with the same command" in text
    if attempt.after > attempt.before and not told:
        faults.append(f"{name} after {attempt.after} steps, and no word of how to resume: {end}")
    saved, found = re.search(r"(\d+) of \d+ steps are saved", text), re.search(r"resuming .*\((\d+) steps\)", text)
    if saved and int(saved[1]) != attempt.after:
        faults.append(f"it said that {saved[1]} steps are saved, there are {attempt.after}")
    if found and int(found[1]) != attempt.before:
        faults.append(f"it resumed from {found[1]} steps, {attempt.before} were saved")
    if (attempt.before and "will take about" in text) or attempt.after < attempt.before:
        faults.append(f"{attempt.before} steps were saved, and it started over")
    return faults


def soak(
    scenario: Scenario, kinds: Iterable[Signals], epochs: int, rng: random.Random, root: Path, say: Callable = print
) -> Outcome:
    """Train once as a reference and again with kills, and compare.

    Args:
        scenario: how to train.
        kinds: the signals, in their order.
        epochs: of the training.
        rng: for the waits, and for the choice of the process that is hit.
        root: a folder for the runs.
        say: called with a line for each start.
    """
    outcome, left, started = Outcome(scenario.name, epochs), list(kinds), time.perf_counter()
    reference, began = root / "reference" / "run", time.time()
    outcome.attempts.append(start(scenario, reference, epochs, rng))
    if outcome.wrong:
        outcome.differences.append("the reference run failed")
        return outcome
    total, starting = saved_steps(reference), (reference / CONFIG).stat().st_mtime - began
    step = ((reference / LAST).stat().st_mtime - began - starting) / total
    for number in count():
        folder, done = root / f"killed{number}" / "run", False
        while not done:
            # At most the start and an equal share of the training that is left, so that all kills find some.
            share = (total - saved_steps(folder)) * step / (len(left) + 1)
            signal = (left[0], rng.uniform(0, starting + share)) if left else (None, 0.0)
            outcome.attempts.append(last := start(scenario, folder, epochs, rng, *signal))
            done = not last.killed
            left = left[last.killed :]  # a signal that came too late does not count: another run receives it
            say(f"{scenario.name}: {last.signal or 'ended'} after {last.seconds:.1f} s, exit code {last.code}, "
                f"{last.after} of {total} steps saved")  # fmt: skip
        if difference := first_difference(reference, folder):
            outcome.differences.append(difference)
        if difference or not left:
            break
    outcome.seconds = time.perf_counter() - started
    return outcome


def first_difference(reference: Path, other: Path) -> str | None:
    """Where two run folders differ, times and names of the runs aside; None if they are the same bit for bit."""
    readers: dict[str, Callable[[Path], Any]] = {
        LAST: read_state,
        MODEL: lambda path: {"content": safetensors.torch.load_file(path), "bytes": path.read_bytes()},
        METRICS: lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        SUMMARY: lambda path: json.loads(path.read_text()),
    }
    for name, read in readers.items():
        if not (other / name).is_file():
            return f"{name}: missing"
        if found := _difference(read(reference / name), read(other / name), name):
            return found
    return None


_MEASURED = ("seconds", "evaluation_seconds", "peak_memory_mb", "run", "finished")


def _difference(a: Any, b: Any, where: str) -> str | None:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (a, b)]
        same = (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)
        return None if same else f"{where}: tensors differ"
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = ({key: value for key, value in one.items() if key not in _MEASURED} for one in (a, b))
        if odd := sorted(map(str, a.keys() ^ b.keys())):
            return f"{where}/{odd[0]}: only in one"
        return next(filter(None, (_difference(a[key], b[key], f"{where}/{key}") for key in a)), None)
    same = type(a) is type(b) and repr(a) == repr(b)  # repr tells every float from every other
    return None if same else f"{where}: {a!r:.40} and {b!r:.40}"


def report(command: str, outcomes: Sequence[Outcome]) -> str:
    """The README of the results."""
    rows = [list(outcomes[0].row), ["---"] * len(outcomes[0].row), *(outcome.row.values() for outcome in outcomes)]
    wrong = [f"- {line}" for outcome in outcomes for line in outcome.wrong]
    return "\n".join([
        "# Trainings that are killed and resumed", "",
        "By the command line, on the procedural set, each scenario trains once undisturbed, and once with kills after",
        "random times. Model, last checkpoint, the metrics of each epoch and the summary are compared bit for bit.", "",
        "```", command, "```", "",
        f"Commit {commit()}, torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores.", "",
        *(f"| {' | '.join(row)} |" for row in rows), "",
        "*In training*: the process had saved steps of its own; the other kills came during its start. *Writing*: it",
        "left a half-written checkpoint, under a temporary name. *Resumed*: starts from a checkpoint, *from previous*:",
        "from the one before the last. `soak.json` lists every start.", "",
        *(wrong or ["All exit codes and messages were right, and no process stayed behind."]), "",
    ])  # fmt: skip


def shares(kills: int, scenarios: int) -> list[list[Signals]]:
    """Kills for each scenario, as equal in number and kind as possible."""
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    return [kinds[i:j] for i, j in pairwise(kills * number // scenarios for number in range(scenarios + 1))]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser(*__doc__.split("\n\n", 1))
    cli.add_number(parser, "--kills", default=30, help="over all scenarios (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the waits (default 0)")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="default: all")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write README.md and soak.json there")
    args = parser.parse_args(argv)
    console, root = Console(stderr=args.json), Path(tempfile.mkdtemp(prefix="soak-"))
    if not console.is_terminal:
        console.width = 140  # output that goes to a file or a pipe has no width of its own
    outcomes, say = [], partial(console.print, highlight=False, markup=False, soft_wrap=True)
    try:
        for number, (name, kinds) in enumerate(zip(args.scenario, shares(args.kills, len(args.scenario)), strict=True)):
            rng = random.Random(f"{args.seed} {name}")
            rng.shuffle(kinds)
            epochs = EPOCHS_A_KILL * max(len(kinds), 1)
            outcomes.append(soak(SCENARIOS[name], kinds, epochs, rng, root / str(number), say))
    except BaseException:  # stopped, as by Ctrl-C: nobody will look at the runs
        shutil.rmtree(root)
        raise
    table = Table(*outcomes[0].row)
    for outcome in outcomes:
        table.add_row(*outcome.row.values())
    console.print(table)
    figures = json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n"
    if args.out:
        command = shlex.join(["python", "-m", "benchmarks.soak", *(sys.argv[1:] if argv is None else argv)])
        for file, text in (("soak.json", figures), ("README.md", report(command, outcomes))):
            with atomic_write(args.out / file) as temporary:
                temporary.write_text(text.replace(str(root), "runs"))
    if args.json:
        print(figures, end="")
    wrong = [line for outcome in outcomes for line in outcome.wrong]
    if wrong:
        say("\n".join([*wrong, f"the runs are kept in {root}"]), style="red")
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    cli.run(main)

"""Several processes: the same training as one process makes of the same batches, by real processes under torchrun."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pointewa.datasets.loader import TrainLoader
from pointewa.errors import ConfigError
from pointewa.safe.torch_files import read_state
from pointewa.train.distributed import World
from tests.train.two_processes import EXACT, exact

ROOT = Path(__file__).parents[2]


def torchrun(what, folder, *options, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return subprocess.run(
        [*command, "-m", "tests.train.two_processes", what, str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def results(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def equality(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equality")
    done = torchrun("equality", folder)
    assert done.returncode == 0, done.stderr
    return folder


def tensors(tree):
    """All tensors of nested dictionaries by their paths."""
    if isinstance(tree, torch.Tensor):
        return {"": tree}
    return {f"{key}/{path}": leaf for key, value in tree.items() for path, leaf in tensors(value).items()}


def test_the_processes_end_with_the_same_bits_after_partitions_of_their_own(equality):
    first, second = results(equality)
    for key in ("model", "optimizer"):
        ours, theirs = tensors(first[key]), tensors(second[key])
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
    assert first["partition"].shape == second["partition"].shape
    assert not torch.equal(first["partition"], second["partition"])


def test_gradients_in_8_bits(tmp_path):
    """The same bits on both processes, near what exact gradients give; resumed, the same bits again."""
    done = torchrun("exchanged", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = results(tmp_path)
    for name in ("exact", "plain", "feedback", "whole", "part"):
        assert torch.equal(first[name], second[name]), name
    assert first["resumed from"] == 6
    assert torch.equal(first["whole"], first["part"])
    for name in ("plain", "feedback"):
        assert 0 < (first[name] - first["exact"]).norm() / first["exact"].norm() < 0.02, name
    sent, plain = first["bytes"]
    assert sent / plain == pytest.approx((1 + 4 / 128) / 4, rel=0.02)  # a byte a value, four a block


def test_two_processes_equal_one_that_accumulates_their_halves(equality, make_trainer, monkeypatch):
    """float64, EWA on, the same partitions: parameters and moments after 20 steps agree to 1e-10."""
    trainer = make_trainer(*EXACT, "train.accumulate=2")
    loader = trainer.data.train
    halves = [
        TrainLoader(loader.clouds, loader.batch_size, loader.num_points, ["scale_shift"], loader.seed, rank, 2)
        for rank in range(2)
    ]
    exact(trainer, *halves)
    states = [state["torch"] for state in read_state(equality / "exact/last.ckpt")["random_states"]]
    assert not torch.equal(*states)
    seeded = [make_trainer("run.name=new", world=World(rank, 2)).rng["torch"] for rank in range(2)]
    calls = 0

    def forward(points):
        """Each half draws from the random state of the process that had it."""
        nonlocal calls
        half = calls % 2
        calls += 1
        torch.set_rng_state(seeded[half])
        logits = trainer.model(points)
        seeded[half] = torch.get_rng_state()
        return logits

    monkeypatch.setattr(trainer, "_announce", lambda: None)
    trainer.forward = forward
    trainer.fit()
    assert (trainer.step, calls) == (20, 40)
    assert all(torch.equal(*pair) for pair in zip(seeded, states, strict=True))  # it was the same draws
    shared = results(equality)[0]
    parameters = dict(trainer.model.named_parameters())
    start = dict(make_trainer("run.name=new").model.double().named_parameters())
    moved = max((value - start[name]).abs().max().item() for name, value in parameters.items())
    assert moved > 1e-3
    for name, value in parameters.items():
        torch.testing.assert_close(value, shared["model"][name], rtol=0, atol=1e-10, msg=name)
    moments = tensors(trainer.optimizer.state_dict()["state"])
    for name, value in tensors(shared["optimizer"]).items():
        torch.testing.assert_close(moments[name], value, rtol=0, atol=1e-10, msg=name)


def test_figures_are_those_of_the_whole_set_and_only_the_first_process_writes(equality):
    lines = [json.loads(line) for line in (equality / "exact/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert "ewa/disagreement/blocks.blocks.1.mlp" in lines[0]
    assert len(list((equality / "exact").glob("events*"))) == 1
    state = read_state(equality / "exact/last.ckpt")
    assert (state["step"], len(state["random_states"])) == (20, 2)


def test_a_set_that_cannot_be_shared_equally_is_evaluated_once_each(tmp_path):
    done = torchrun("metrics", tmp_path)
    assert done.returncode == 0, done.stderr
    for rank, found in enumerate(results(tmp_path)):
        assert len(found["shared"]) == 59
        assert torch.equal(found["labels"], found["whole_labels"])
        torch.testing.assert_close(found["shared"], found["whole"], rtol=0, atol=1e-5)
        assert torch.equal(found["rows"], torch.ones(3, 2, dtype=torch.int64))
        assert (found["told"], found["largest"]) == ("first", [1, 0, 7])
        assert found["order"] == ([0, 1] if rank == 0 else [])
        assert found["failed"] == ("damaged" if rank == 0 else "exit 2")


@pytest.mark.slow
def test_keys_of_all_processes_go_into_a_queue_that_each_has(tmp_path):
    """With EWA, by which the processes partition tokens differently."""
    done = torchrun("queues", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = results(tmp_path)
    for name, value in first["model"].items():
        assert torch.equal(second["model"][name], value), name
    end = first["model"]["queue_ptr"].item()
    assert end == 160 % 50
    expected = torch.cat([first["given"], second["given"]])
    assert expected.shape == (16, 512)
    assert not torch.equal(first["given"], second["given"])
    place = torch.arange(end - 16, end) % 50
    assert torch.equal(first["model"]["queue"][:, place].T, expected)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_torchrun_s_restart_goes_on(tmp_path):
    whole = torchrun("killed", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    ended = torchrun("killed", tmp_path / "ended", KILL="1")
    assert ended.returncode != 0
    assert "error: process 0 of 2 lost another one" in ended.stderr
    assert "the same command resumes it from its last checkpoint" in ended.stderr
    assert read_state(tmp_path / "ended/killed/last.ckpt")["step"] == 6
    restarted = torchrun("killed", tmp_path / "restarted", "--max-restarts=1", KILL="1")
    assert restarted.returncode == 0, restarted.stderr
    files = [tmp_path / name / "killed/model.safetensors" for name in ("whole", "restarted")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_sharded_experts_are_averaged_without_a_message(tmp_path):
    """FSDP2, the experts split along their output dimension: Eq. 6 stays local and gives the same weights."""
    done = torchrun("sharded", tmp_path)
    assert done.returncode == 0, done.stderr
    for found in results(tmp_path):
        assert found["messages"] == 0
        assert found["difference"] < 1e-6
        assert (list(found["whole"]), list(found["local"])) == ([4, 64, 32], [4, 32, 32])
        assert "the experts are sharded over processes" in found["refused"]


def test_what_cannot_be_shared_is_refused(make_trainer):
    with pytest.raises(ConfigError, match=r"train.batch_size: expected a multiple of 3 processes"):
        make_trainer(world=World(0, 3))
    with pytest.raises(ConfigError, match=r"train.accumulate x processes \(2 x 4\), found 20"):
        make_trainer("train.batch_size=20", "train.accumulate=2", world=World(0, 4))
    with pytest.raises(ConfigError, match="80 processes, but only 60 objects"):
        make_trainer("train.batch_size=80", world=World(0, 80))


def test_the_processes_share_every_batch(make_trainer):
    loader = make_trainer().data.train
    numbers = torch.arange(len(loader.clouds)).float()
    clouds = replace(loader.clouds, points=numbers[:, None, None].expand(-1, 1024, 3).contiguous())
    shares = [TrainLoader(clouds, 16, 128, [], 0, rank, 4) for rank in range(4)]
    seen = []
    for number, parts in enumerate(zip(*(share.epoch(3) for share in shares), strict=True)):
        assert [points.shape for points, *_ in parts] == [(4, 128, 3)] * 4
        objects = torch.cat([points[:, 0, 0] for points, *_ in parts]).long()
        assert torch.equal(torch.cat([labels for _, labels, _ in parts]), clouds.labels[objects])
        assert [clouds.object_names[index] for index in objects.tolist()] == loader.object_names(3, number)
        seen += objects.tolist()
    assert len(set(seen)) == len(seen) == 160

"""Studies that cannot be: one line says what is wrong, and nothing is written."""

import pytest

from tests.tools.test_study import fails

GOOD = "arms: {a: {}, b: {ewa: {enabled: false}}}\nseeds: [0]\n"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "no such file"),
        ("arms: [", [], "not valid YAML"),
        ("", [], "s.yaml: arms: expected a mapping of names to config keys, found nothing"),
        ("arms: {a: {}}", [], "s.yaml: seeds: expected a list of numbers, such as [0, 1, 2], found nothing"),
        ("arms: {a: {}}\nseeds: [0, 0]", [], "s.yaml: seeds: expected different numbers from 0 on, found [0, 0]"),
        ("arms: {a: {}}\nseeds: [-1]", [], "seeds: expected different numbers from 0 on"),
        ("arms: {a: {}}\nseeds: [yes]", [], "seeds: expected a list of numbers"),
        ("arms: {a: {}}\nseeds: {b: [0]}", [], "s.yaml: seeds: expected some of a, and default, found 'b'"),
        (GOOD.replace("[0]", "{a: [0]}"), [], "s.yaml: seeds.default: expected a list of numbers, such as [0, 1, 2]"),
        (GOOD.replace("[0]", "{default: [0], b: [1, 1]}"), [], "s.yaml: seeds.b: expected different numbers from 0 on"),
        ("arms: {a: {}, b: {}}\nseeds: {a: [0], b: [1]}", [], "arms.b: the configuration is that of a: the same"),
        (GOOD + "arm: 1", [], "s.yaml: unknown key 'arm': expected one of description, configs, settings, arms, seeds"),
        (GOOD + "configs: x.yaml", [], "configs: expected a list of files"),
        (GOOD + "configs: [x.yaml]", [], "x.yaml: no such file: expected one of"),
        (GOOD + "settings: [1]", [], "settings: expected a mapping of config keys, found [1]"),
        (GOOD + "settings: {train: {epoch: 3}}", [], "arms.a, seed 0: unknown key train.epoch: did you mean"),
        (GOOD + "settings: {train: {epochs: many}}", [], "train.epochs: Value 'many' of type 'str' could not"),
        (GOOD + "settings: {train: {seed: 3}}", [], "settings: train.seed: the study sets it for each of its runs"),
        (GOOD + "settings: {run: {name: x}}", [], "settings: run.name: the study sets it"),
        (GOOD + "settings: {model: {preset: huge}}", [], "model.preset: expected one of point_bert, "),
        ("arms: {a: {}, a: {}}\nseeds: [0]", [], "not valid YAML"),
        ("arms: {a/b: {}}\nseeds: [0]", [], "arms: expected a name of letters, digits, '.', '_', '+', '-', found"),
        ("arms: {1: {}}\nseeds: [0]", [], "arms: expected a name of letters"),
        ("arms: {a: 3}\nseeds: [0]", [], "arms.a: expected a mapping of config keys, found 3"),
        ("arms: {a: {}, b: {}}\nseeds: [0]", [], "arms.b: the configuration is that of a: the same run twice"),
        (GOOD + "folds: [fold0]", [], "folds: expected one config key with its values, such as {data.variant: [fold0"),
        (GOOD + "folds: {data: {variant: [a], name: [b]}}", [], "folds: expected one config key with its values"),
        (GOOD + "folds: {data.variant: fold0}", [], "folds.data.variant: expected a list of names of letters, digits"),
        (GOOD + "folds: {data.variant: []}", [], "folds.data.variant: expected a list of names"),
        (GOOD + "folds: {data.variant: [a-b]}", [], "folds.data.variant: expected a list of names"),
        (GOOD + "folds: {data.variant: [0]}", [], "folds.data.variant: expected a list of names"),
        (GOOD + "folds: {data.variant: [a, a]}", [], "folds.data.variant: expected different values, found ['a', 'a']"),
        (GOOD + "folds: {data.folds: [a]}", [], "arms.a, seed 0, a: unknown key data.folds"),
        (GOOD + "folds: {train.seed: [a]}", [], "folds: train.seed: the study sets it"),
        (GOOD + "settings: {data: {variant: x}}\nfolds: {data.variant: [a]}", [], "data.variant is also set elsewhere"),
        (GOOD + "folds: {data.variant: [a]}", ["data.variant=b"], "data.variant is also set elsewhere"),
        (GOOD, ["ewa.enabled=true"], "arms.b: the configuration is that of a"),
        (GOOD, ["train.seed=1"], "train.seed: the study sets it"),
        (GOOD, ["run.overwrite=true"], "run.overwrite: the study sets it"),
        (GOOD, ["--only", "c"], "--only: expected some of a, b, found 'c'"),
        (GOOD, ["--jobs", "0"], "--jobs: expected at least 1, found 0"),
        (GOOD, ["--budget", "-1"], "--budget: expected at least 0, found -1"),
        (GOOD, ["--report-only"], "no run of "),
    ],
)  # fmt: skip
def test_studies_that_cannot_be(tmp_path, capsys, text, arguments, message):
    if text is not None:
        (tmp_path / "s.yaml").write_text(text)
    arguments = [str(tmp_path / "s.yaml"), *arguments, f"run.dir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    assert message in fails(arguments, capsys)
    assert not list(tmp_path.glob("*/*"))

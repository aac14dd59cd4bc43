"""The plots of a study: few arms in one panel, of many arms each in its own."""

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from pointewa.study import plots
from pointewa.study.figures import Arm, Result
from pointewa.tasks.classification import Classification


def arms(count, epochs=10):
    """Arms of two seeds: the validation accuracy rises to 80 and the arm's number; the experts of all but the first
    disagree."""

    def records(arm, seed):
        for epoch in range(epochs):
            more = {"ewa/disagreement/b.1": 2.0**-epoch} if arm else {}
            accuracy = 80 + arm + seed - 60 * 0.3**epoch
            yield {"epoch": epoch, "train/loss": 3.0 - 0.1 * epoch, "val/oa": accuracy, **more}

    def results(arm):
        return {seed: Result(None, {}, list(records(arm, seed)), Classification) for seed in (0, 1)}

    differences = [{}] + [{0: arm, 1: arm + 1} for arm in range(1, count)]
    return [
        Arm(f"arm{arm}", Classification, results(arm), "arm0" if arm else "", None, differences[arm])
        for arm in range(count)
    ]


@pytest.mark.parametrize("count", [2, 7])
def test_few_arms_share_a_panel(count):
    loss, accuracy = plots._curves(arms(count)).findobj(Axes)
    for axes in (loss, accuracy):
        assert [line.get_label() for line in axes.lines] == [f"arm{arm}" for arm in range(count)]
        assert len({to_hex(line.get_color()) for line in axes.lines}) == count
    assert accuracy.lines[1].get_ydata()[-1] == pytest.approx(81.5, abs=0.01)
    assert len(plots._disagreement(arms(count)).findobj(Axes)) == 1


def test_of_many_arms_each_has_a_panel_with_the_baseline():
    figure = plots._curves(arms(18))
    panels = [axes for axes in figure.findobj(Axes) if axes.get_title()]
    assert [axes.get_title() for axes in panels] == 2 * [f"arm{arm}" for arm in range(1, 18)]
    for arm, axes in enumerate(panels[17:], 1):
        *others, base, own = axes.lines
        assert len(others) == 18
        assert (base.get_label(), own.get_label()) == ("arm0", f"arm{arm}")
        assert base.get_ydata()[-1] == pytest.approx(80.5, abs=0.01)
        assert own.get_ydata()[-1] == pytest.approx(80.5 + arm, abs=0.01)
        assert to_hex(base.get_color()) == "#000000" != to_hex(own.get_color())
    low, high = panels[17].get_ylim()  # where the curves differ, not where they start
    assert 75 < low < 80
    assert 98 < high < 102
    assert {axes.get_ylim() for axes in panels[17:]} == {(low, high)}


def test_of_many_disagreements_too():
    panels = [axes for axes in plots._disagreement(arms(18)).findobj(Axes) if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [f"arm{arm}" for arm in range(2, 18)]  # on that of arm1
    assert {axes.get_yscale() for axes in panels} == {"log"}


def test_differences_of_many_arms_take_less_height_each():
    few, many = plots._differences(arms(5)), plots._differences(arms(18))
    assert (few.get_figheight() - 1.6) / 4 == pytest.approx(0.6)
    assert (many.get_figheight() - 1.6) / 17 == pytest.approx(0.36)
    assert [label.get_text() for label in many.findobj(Axes)[0].get_yticklabels()] == [f"arm{i}" for i in range(1, 18)]


def test_plots_for_papers_are_the_same_bytes_each_time(tmp_path):
    assert plots.save_plots(tmp_path / "a", arms(3)) == ["curves.png", "disagreement.png", "differences.png"]
    assert not list((tmp_path / "a").glob("*.pdf"))
    for name in ("b", "c"):
        plots.save_plots(tmp_path / name, arms(3), pdf=True)
    found, again = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("b", "c"))
    assert len(found) == 6
    assert found == again
    assert found["curves.pdf"].startswith(b"%PDF")
    plots.save_plots(tmp_path / "b", arms(1), pdf=True)  # nothing to compare: what is older does not stay
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["curves.pdf", "curves.png"]

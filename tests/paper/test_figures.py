"""The paper's own figures."""

import statistics

import pytest

from dvn_cli.paper import figures as paper
from dvn_cli.training.methods import METHODS


@pytest.mark.parametrize("name", paper.scenarios())
def test_the_papers_figures_agree_among_themselves(name: str) -> None:
    of = paper.find(name)
    assert set(of.methods) <= set(METHODS)
    for figures in of.rows:
        assert figures.method in of.methods
        assert len(figures.accuracy) == len(of.tasks)
        assert isinstance(figures.units, int) or len(figures.units) == len(of.tasks)
        assert of.average == (figures.average is not None)
        if figures.average is not None:
            assert figures.average == pytest.approx(statistics.mean(figures.accuracy))
    if of.times is not None:
        assert of.times.task <= len(of.tasks)
        top = of.times.networks[-1]
        for network in of.times.networks:
            assert network.speedup in (None, pytest.approx(top.ms / network.ms, abs=0.05))
            assert network.density in (None, pytest.approx(100 * network.params / top.params, abs=0.05))


def test_all_scenarios_are_there() -> None:
    assert set(paper.scenarios()) == {"j1", "j2", "j3", "h1", "s1", "s2"}
    at_hand = {name for name, of in paper.scenarios().items() if of.rows}
    assert at_hand == {"j1", "h1", "s1"}  # Table 5 and the curves of Figures 5 and 6 are not

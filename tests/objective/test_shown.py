"""What an objective shows of itself: in words, in a notebook, and after its weights have moved."""

import copy
import pickle
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings

import cyclevae as cv
from cyclevae.objective.shown import later
from objective.test_plan import made, some_terms
from running import of
from strategies import quick


class Cells(HTMLParser):
    """The rows of a table, as a browser reads them."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1] += data


def cells(html):
    parser = Cells()
    parser.feed(html)
    return [tuple(row) for row in parser.rows]


def test_resting_terms_are_shown_too():
    late = cv.CycleText(weight=cv.ramp(4.0, warmup_steps=10, ramp_steps=5), every=2)
    objective = of(cv.Text(), late)
    head, _, *lines = str(objective).splitlines()
    assert head.endswith(": 2 terms, 1 pass at step 0, 3 where all terms run")
    assert lines[1].split("  ")[0] == "cycle_text"
    assert "0 to 4 in steps 10..15, at 1 of 2 steps" in lines[1]
    assert str(objective.overview(12)).splitlines()[0].endswith("3 passes at step 12")


@settings(quick, max_examples=20)
@given(some_terms)
def test_the_costs_are_those_of_the_plan(told):
    """A pass is counted once, whoever reads it, and none is forgotten."""
    objective = made(told)
    header, *rows = cells(objective._repr_html_())
    costs = sum(int(row[header.index("costs")]) for row in rows)
    everything = made([(kind, options | {"weight": 1.0}) for kind, options in told])
    if len(everything.terms) == len(objective.terms):
        assert costs == everything.passes(0)
    names = [row[0] for row in rows if row[0]]
    assert names == [term.name for term in objective.terms]


def test_a_notebook_shows_the_same_table():
    objective = of(cv.Latent(), cv.CycleText(policy=cv.GradientPolicy(freeze=("a<b>&.*",))))
    table = objective.describe()
    shown = cells(table._repr_html_())
    assert len(shown) == len(table.splitlines()) == 4
    for row, line in zip(shown, table.splitlines(), strict=True):
        assert "".join(row).replace(" ", "") == line.replace(" ", "")
    assert shown[-1][-1] == "a<b>&.*"
    assert repr(table) == str(table)
    assert pickle.loads(pickle.dumps(table)) == copy.deepcopy(table) == table


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (1.0, ""),
        (cv.ramp(4.0, warmup_steps=10), "4 from step 10"),
        (cv.ramp(4.0, ramp_steps=10), "0 to 4 in steps 0..10"),
        (cv.take_turns(4.0, 1.0)[0], "4, 1 of 2 turns"),
        (
            cv.take_turns(cv.ramp(2.0, 5), 1.0, together=0.25)[0],
            "2 from step 5, 1 of 2 turns and 25% of all",
        ),
        (max, "by max"),
    ],
)
def test_weights_that_move_are_put_into_words(weight, words):
    assert later(cv.Text(weight=weight)) == words


def test_phases_show_each_objective_from_its_start():
    late = cv.CycleText(weight=cv.ramp(4.0, warmup_steps=10))
    both = cv.Phases((of(cv.Text()), of(cv.Text(), late)), starts=(0, 10))
    heads = [block.splitlines()[0] for block in repr(both).split("\n\n")]
    assert [head.split(": ")[1] for head in heads] == [
        "1 term, 1 pass at step 0",
        "2 terms, 3 passes at step 10",
    ]
    assert both._repr_html_().count("<table>") == 2

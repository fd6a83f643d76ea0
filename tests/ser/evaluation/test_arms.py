"""Each arm has one title, and every place that people read shows that title."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from mal_adapter.cli import app
from mal_adapter.ser.evaluation.arms import ARMS, AUDIT, WRONG_PASTS
from mal_adapter.ser.evaluation.plots import plots_of
from mal_adapter.ser.evaluation.report import figures_of, write_report
from tests.docs.pages import DOCS
from tests.ser.evaluation.made_evaluations import made_evaluation


def texts_by_plot(*arms: str) -> dict[str, list[str]]:
    """Title of a plot -> the words in its SVG, for a report of these arms."""
    evaluation = made_evaluation(arms=list(arms))
    plots = plots_of(figures_of(evaluation), evaluation.answers)
    return {title: [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
            for title, svg, _ in plots}  # fmt: skip


def test_every_title_is_short_and_its_own():
    titles = [arm.title for arm in ARMS.values()]
    assert len(set(titles)) == len(titles) == 9
    assert max(map(len, titles)) <= 30
    assert {*AUDIT, *WRONG_PASTS} <= set(ARMS)


def test_the_title_of_the_oracle_names_the_speakers_it_is_given():
    assert "true speaker" in ARMS["oracle_speakers"].title
    assert not [name for name, arm in ARMS.items() if "label" in f"{arm.title} {arm.description}"]


def test_the_plot_of_all_arms_shows_each_title():
    words = texts_by_plot(*ARMS)["Accuracy by arm"]
    assert {text for text in words if "(" in text} == {f"{name} ({arm.title})" for name, arm in ARMS.items()}


@pytest.mark.parametrize("name", ARMS)
def test_the_plots_of_one_arm_show_its_title(name: str):
    words = texts_by_plot(name)
    title = ARMS[name].title
    assert title in words["Confusion"]
    assert any(text.startswith(f"{title}, error ") for text in words["Reliability"])
    others = {arm.title for arm in ARMS.values()} - {title}
    assert not [text for texts in words.values() for text in texts if text in others]


def test_the_plots_of_two_arms_tell_them_apart_by_their_titles():
    words = texts_by_plot("host_only", "own")
    for plot in ("Gain by turn", "Confusion", "A dialogue's timeline"):
        assert {ARMS["host_only"].title, ARMS["own"].title} <= set(words[plot]), plot


def test_the_table_of_the_report_shows_each_title(tmp_path: Path):
    write_report(tmp_path, [made_evaluation()])
    page = (tmp_path / "report.html").read_text().replace("&#39;", "'")
    shown = re.findall(r'<td>(\w+)</td><td class="words"><b>(.*?)</b><br>(.*?)</td>', page)
    assert shown == [(name, *arm) for name, arm in ARMS.items()]


def test_the_command_help_shows_each_title(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "800")
    text = CliRunner().invoke(app, ["evaluate", "--help"]).stdout
    (offered,) = re.findall(r"--arms .*", text)
    assert ", ".join(f"{name} ({arm.title})" for name, arm in ARMS.items()) in offered
    assert f"Default: {', '.join(AUDIT)}." in offered


def test_the_docs_show_each_title():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", (DOCS / "command_line.md").read_text(), re.MULTILINE)
    assert [row for row in rows if row[0] in ARMS] == [(name, *arm) for name, arm in ARMS.items()]

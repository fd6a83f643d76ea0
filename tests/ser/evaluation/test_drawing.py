"""A dialogue as coloured cells: the emotions' colours, crosses at wrong answers, and words that fit in their cells."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mal_adapter.ser.evaluation.colors import emotion_colors
from mal_adapter.ser.evaluation.drawing import draw_answers
from mal_adapter.ser.labels import DEMO, EMORYNLP, IEMOCAP_6, MELD


def drawn(labels, truths, *answers):
    """Axes with one row per list of answers; an answer has probability 1."""
    figure = Figure(figsize=(9.6, 2), layout="constrained")
    axes = figure.subplots()
    rows = [[{label: float(label == one) for label in labels} for one in row] for row in answers]
    draw_answers(axes, truths, dict(zip(("without memory", "with memory"), rows, strict=False)))
    figure.draw_without_rendering()
    return axes


def test_cells_have_the_emotions_colors_and_crosses_mark_errors():
    axes = drawn(DEMO, ["sad", "happy", None], ["sad", "sad", "angry"], ["sad", "happy", "happy"])
    colors = emotion_colors(DEMO)
    cells = [to_hex(cell.get_facecolor()) for cell in axes.patches]
    assert [cells[turn * 3 + 1] for turn in range(3)] == [colors["sad"], colors["sad"], colors["angry"]]
    assert cells[2 * 3] not in colors.values()  # its truth is unknown
    words = [text.get_text() for text in axes.texts]
    assert words == [
        "sad", "sad\n100 %", "sad\n100 %", "happy", "sad\n✗ 100 %", "happy\n100 %", "–", "angry\n100 %", "happy\n100 %"
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == ["truth", "without memory", "with memory"]


@pytest.mark.parametrize("labels", [DEMO, MELD, IEMOCAP_6, EMORYNLP], ids=len)
def test_words_fit_in_their_cells_or_a_legend_replaces_them(labels):
    longest = max(labels, key=len)
    for turns in range(6, 30):
        axes = drawn(labels, [longest] * turns, [min(labels, key=len)] * turns, [longest] * turns)
        for cell, text in zip(axes.patches, axes.texts, strict=True):
            inside, words = cell.get_window_extent(), text.get_window_extent()
            assert inside.x0 <= words.x0, (turns, text)
            assert words.x1 <= inside.x1, (turns, text)
            assert inside.height >= words.height, (turns, text)
        if (legend := axes.get_legend()) is not None:
            assert {text.get_text() for text in axes.texts} == {"", "✗"}
            assert [text.get_text() for text in legend.get_texts()] == list(labels)
            break
    assert legend is not None
    assert turns > 8

"""Emotions keep their colours, and the colours of a label set are distinct for colour-blind readers."""

from itertools import combinations

import numpy as np
import pytest

from mal_adapter.ser.evaluation.colors import emotion_colors, ink_on
from mal_adapter.ser.labels import DEMO, EMORYNLP, IEMOCAP_4, IEMOCAP_6, M3ED, MELD

SETS = {"demo": DEMO, "meld": MELD, "iemocap4": IEMOCAP_4, "iemocap6": IEMOCAP_6, "emorynlp": EMORYNLP, "m3ed": M3ED}
#: Full colour blindness, as matrices on linear RGB (Machado, Oliveira and Fernandes, 2009).
VISIONS = {
    "usual": np.eye(3),
    "protanopia": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deuteranopia": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6727, 0.0472], [-0.0118, 0.0429, 0.9689]]),
    "tritanopia": np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color):
    channels = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB, in which a difference of 2.3 is just noticeable."""
    xyz = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("name", SETS)
def test_the_colors_of_a_label_set_are_distinct_for_every_vision(name, vision):
    colors = emotion_colors(SETS[name])
    assert list(colors) == list(SETS[name])
    for (one, first), (two, second) in combinations(colors.items(), 2):
        apart = np.linalg.norm(lab(VISIONS[vision] @ linear(first)) - lab(VISIONS[vision] @ linear(second)))
        assert apart > 14, f"{one} {first} and {two} {second} are {apart:.1f} apart to {vision} vision"


def test_an_emotion_has_one_color_in_every_set():
    assert emotion_colors(DEMO)["sad"] == emotion_colors(MELD)["sadness"] == emotion_colors(["Sad", "other"])["Sad"]
    assert emotion_colors(["happy", "joy"])["happy"] == emotion_colors(DEMO)["happy"]


def test_unknown_and_too_many_labels_have_colors_too():
    many = [f"label {number}" for number in range(40)]
    assert len(set(emotion_colors(many[:12]).values())) == 12
    assert len(emotion_colors(many)) == 40


def test_words_on_a_color_have_enough_contrast():
    for color in set().union(*(emotion_colors(labels).values() for labels in SETS.values())):
        ink, ground = (float(XYZ[1] @ linear(one)) + 0.05 for one in (ink_on(color), color))
        assert max(ink, ground) / min(ink, ground) >= 4.5, color

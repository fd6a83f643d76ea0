"""One colour per emotion, the same in every picture and distinct for colour-blind readers.

The colours are from the palettes for colour-blind readers of Okabe and Ito (2008) and Tol (2021).
"""

from collections.abc import Iterable

from mal_adapter.ser.names import label_keys

__all__ = ["emotion_colors", "ink_on"]

_GREY, _ORANGE, _VERMILLION, _BLUE = "#b0b0b0", "#e69f00", "#d55e00", "#0072b2"
_SKY, _PINK, _GREEN, _YELLOW, _WINE = "#56b4e9", "#cc79a7", "#009e73", "#f0e442", "#882255"

#: The first three letters of the names that corpora use.
_KNOWN = {
    "neu": _GREY, "hap": _ORANGE, "joy": _ORANGE, "ang": _VERMILLION, "mad": _VERMILLION, "sad": _BLUE, "sur": _SKY,
    "fea": _WINE, "fru": _WINE, "sca": _WINE, "dis": _GREEN, "exc": _YELLOW, "pea": _GREEN, "pow": _YELLOW,
}  # fmt: skip
_SPARE = (_SKY, _GREEN, _YELLOW, _WINE, _PINK, _ORANGE, _BLUE, _VERMILLION, _GREY, "#332288", "#117733", "#ddcc77")


def emotion_colors(labels: Iterable[str]) -> dict[str, str]:
    """Choose a colour for each label. The usual emotions always have the same colour; others take the remaining ones.

    Args:
        labels: The names of a label set, in its order. With more than twelve labels, colours repeat.

    Returns:
        Label -> "#rrggbb", in the given order.

    Example:
        >>> emotion_colors(["neutral", "sadness", "bored"])
        {'neutral': '#b0b0b0', 'sadness': '#0072b2', 'bored': '#56b4e9'}
    """
    labels = list(labels)
    colors: dict[str, str] = {}
    for label in labels:
        known = _KNOWN.get(label_keys(label)[0][:3])
        if known is not None and known not in colors.values():
            colors[label] = known
    for label in labels:
        if label not in colors:
            left = [color for color in _SPARE if color not in colors.values()]
            colors[label] = left[0] if left else _SPARE[len(colors) % len(_SPARE)]
    return {label: colors[label] for label in labels}


def ink_on(color: str) -> str:
    """Choose black or white text for a background, whichever has more contrast.

    Args:
        color: The background, "#rrggbb".

    Returns:
        "#000000" or "#ffffff".

    Example:
        >>> ink_on("#0072b2"), ink_on("#f0e442")
        ('#ffffff', '#000000')
    """
    return "#000000" if _luminance(color) > 0.179 else "#ffffff"  # at 0.179, WCAG's contrast with both is equal


def _luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it, 0 to 1."""
    channels = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

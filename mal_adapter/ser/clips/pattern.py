"""Patterns of file names: `{speaker}/{emotion}_{text}.wav`."""

import re
import string

from mal_adapter.errors import ConfigError

__all__ = ["compiled_pattern"]

FIELDS = ("speaker", "emotion", "text", "sex", "intensity")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{2,4}$")


def compiled_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern of paths below a folder, with the fields as groups.

    Args:
        pattern: `{speaker}` and `{emotion}`; if wanted `{text}`, `{sex}` and `{intensity}`; `{}` for what is ignored.
            `{speaker:2}` has exactly two characters; any other field ends before the first character that follows it in
            the pattern. No field has a `/`. A field that occurs twice must have the same text. Without a suffix at the
            end, any suffix fits.

    Raises:
        ConfigError: The pattern is not one, or it is ambiguous.

    Example:
        >>> compiled_pattern("{speaker}/{emotion}_{}.wav").fullmatch("Anna/sad_01.WAV").groupdict()
        {'speaker': 'Anna', 'emotion': 'sad'}
        >>> compiled_pattern("{speaker:2}{text:3}{emotion:1}{}").fullmatch("03a01Fa.wav")["emotion"]
        'F'
    """
    try:
        parts = list(string.Formatter().parse(pattern.replace("\\", "/").removeprefix("./")))
    except ValueError as error:
        raise ConfigError(f"the pattern {pattern!r} is not one: {error}") from error
    expression = ""
    seen: set[str] = set()
    for place, (literal, field, width, _) in enumerate(parts):
        expression += re.escape(literal)
        if field is None:
            continue
        if field and field not in FIELDS:
            raise ConfigError(
                f"the pattern {pattern!r} has the field {field!r}; known are {', '.join(FIELDS)} and {{}}"
            )
        following = parts[place + 1][0][:1] if place + 1 < len(parts) else ""
        if width and not (width.isdecimal() and int(width)):
            raise ConfigError(f"the pattern {pattern!r}: {width!r} is not a number of characters")
        if not width and not following and place + 1 < len(parts):
            raise ConfigError(
                f"the pattern {pattern!r} has two fields side by side; give the first its number of characters, "
                f"as in {{{field}:2}}"
            )
        text = f"[^/]{{{width}}}" if width else _text_before("" if _ends_in_suffix(parts, place) else following)
        if field and field in seen:
            expression += f"(?P={field})"
        else:
            expression += f"(?P<{field}>{text})" if field else text
        seen.add(field)
    if missing := [field for field in ("speaker", "emotion") if field not in seen]:
        raise ConfigError(
            f"the pattern {pattern!r} has no {{{missing[0]}}}; an example is {{speaker}}/{{emotion}}_{{}}.wav"
        )
    if not _SUFFIX.search(parts[-1][0] if parts[-1][1] is None else ""):
        expression += r"\.[^/.]+"
    return re.compile(expression, re.IGNORECASE)


def _text_before(following: str) -> str:
    return f"[^/{re.escape(following)}]+" if following else "[^/]+"


def _ends_in_suffix(parts: list[tuple[str, str | None, str | None, str | None]], place: int) -> bool:
    """Whether only a suffix follows a field: the field may then have dots itself."""
    return place == len(parts) - 2 and parts[-1][1] is None and _SUFFIX.fullmatch(parts[-1][0]) is not None

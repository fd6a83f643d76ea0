"""Values and names as text: short enough for a message, and valid in JSON."""

__all__ = ["clip", "in_unicode", "shown"]


def clip(text: str, length: int = 80) -> str:
    """`text`, its end replaced by `...` if it has more than `length` characters.

    Example:
        >>> clip("neutral", 6), clip("happy", 6)
        ('neu...', 'happy')
    """
    return text if len(text) <= length else text[: length - 3] + "..."


def shown(value: object) -> str:
    """The `repr` of a value for an error message, of at most 80 characters.

    Example:
        >>> shown("16"), len(shown("16" * 100))
        ("'16'", 80)
    """
    return clip(repr(value))


def in_unicode(name: str) -> str:
    """The name of a file or folder as text for JSON. Bytes that are not UTF-8, in Python lone surrogates, become �.

    Example:
        >>> in_unicode("m\\udcfasica"), in_unicode("\\udcc3\\udca9")
        ('m�sica', 'é')
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

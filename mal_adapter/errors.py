"""Typed errors and warnings.

Each error is also the builtin that a caller who does not know this library would catch: a bad argument is a
`ValueError`, a wrong moment a `RuntimeError`. A message says what was given, what was expected and what to do next.
"""

from collections.abc import Sequence
from typing import Any

__all__ = [
    "AdapterFormatError",
    "AdapterNotFoundError",
    "AudioError",
    "AudioFormatError",
    "AudioMaskError",
    "AudioOutsideSessionWarning",
    "AudioTooLongError",
    "BaseModelWarning",
    "ConfigError",
    "CopyError",
    "CorpusError",
    "EvaluationError",
    "HostError",
    "HostMismatchError",
    "HubError",
    "IgnoredHookWarning",
    "IncompleteCorpusWarning",
    "LabelError",
    "MalAdapterError",
    "MalAdapterWarning",
    "ManifestError",
    "MetricsError",
    "SessionConflictError",
    "SessionError",
    "SkippedWriteWarning",
    "StateFormatError",
    "StateMismatchError",
    "StoreError",
    "TrainingError",
    "UninformativeDataWarning",
    "UnsavedSessionWarning",
    "raise_problems",
]


class MalAdapterError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(MalAdapterError, ValueError):
    """A field of a configuration is out of range or does not fit another field."""


class HostError(MalAdapterError, ValueError):
    """The host's decoder layers, width or audio positions could not be determined, or its answers are no numbers."""


class AudioMaskError(MalAdapterError, ValueError):
    """An audio mask does not fit the hidden states, or the prompt can not be assigned to sessions."""


class SessionError(MalAdapterError, RuntimeError):
    """A session was used in a way that leaves open whose memory is meant."""


class StateMismatchError(MalAdapterError, ValueError):
    """A memory state belongs to another adapter, or its shapes do not fit this one."""


class StateFormatError(MalAdapterError, ValueError):
    """A file or buffer is not a readable memory state."""


class AdapterFormatError(MalAdapterError, ValueError):
    """An adapter folder is incomplete, damaged, or of a format this version can't read."""


class AdapterNotFoundError(MalAdapterError, FileNotFoundError):
    """There is no such adapter folder or Hub repository, or it may not be seen."""


class HubError(MalAdapterError, ConnectionError):
    """The Hugging Face Hub can't be reached, or did not do what it was asked."""


class StoreError(MalAdapterError, OSError):
    """A session store can't be reached, or can't keep what it was given."""


class SessionConflictError(MalAdapterError, RuntimeError):
    """Someone else has continued this session in the meantime, and their state stays.

    Attributes:
        state: The `MemoryState` that could not be kept, to be put under another session id; None if none was at hand.
    """

    state: Any = None


class CopyError(MalAdapterError, TypeError):
    """An object that belongs to this process can't be pickled or deep-copied; the message says what to hand over."""


class HostMismatchError(MalAdapterError, ValueError):
    """An adapter was trained for another kind of host than the one it is attached to."""


class ManifestError(MalAdapterError, ValueError):
    """A dialogue manifest has a line that can't be understood."""


class CorpusError(MalAdapterError, ValueError):
    """A corpus can't be read from the given folder: its files are not there, or have another format."""


class AudioError(MalAdapterError, ValueError):
    """An audio file is missing, unreadable, damaged, empty or silent, or its channels cancel."""


class AudioFormatError(AudioError):
    """A file has no format that is read as audio."""


class AudioTooLongError(AudioError):
    """An utterance is longer than the host's audio encoder accepts; it is never cut silently."""


class LabelError(MalAdapterError, ValueError):
    """A label is not in the label set, or the labels can not be told apart by the host."""


class MetricsError(MalAdapterError, ValueError):
    """Answers can't be scored: none are left, they do not fit the truth, or scikit-learn is not installed."""


class TrainingError(MalAdapterError, RuntimeError):
    """Training can't go on: a loss or gradient is not finite, or a checkpoint does not belong to this run."""


class EvaluationError(MalAdapterError, RuntimeError):
    """A folder holds another evaluation or none, or two evaluations are not of the same utterances."""


class MalAdapterWarning(UserWarning):
    """Base of every warning that this library emits."""


class SkippedWriteWarning(MalAdapterWarning):
    """A write was not finite and did not land; the state is as before."""


class AudioOutsideSessionWarning(MalAdapterWarning):
    """Audio passed through a host with an attached memory, but outside a session."""


class BaseModelWarning(MalAdapterWarning):
    """An adapter names another base checkpoint than the host it is attached to."""


class UnsavedSessionWarning(MalAdapterWarning):
    """A session store was out of reach; the session goes on in this process, and the end of its block tries again."""


class IgnoredHookWarning(MalAdapterWarning):
    """The host is compiled already, so hooks registered now may be ignored."""


class IncompleteCorpusWarning(MalAdapterWarning):
    """A corpus was read, but is not what was published: clips are missing, or the counts differ."""


class UninformativeDataWarning(MalAdapterWarning):
    """Dialogues can not show what a memory does: no labelled utterance has another one before it."""


def raise_problems(problems: Sequence[MalAdapterError]) -> None:
    """Raise what checks have found, all at once: one run tells everything that has to be changed.

    Args:
        problems: In the order of the message; none is no error.

    Raises:
        MalAdapterError: The only problem; or an error of the first one's type with all messages.

    Example:
        >>> raise_problems([ConfigError("batch_size is 0"), LabelError("there is no label")])
        Traceback (most recent call last):
        mal_adapter.errors.ConfigError: 2 problems: (1) batch_size is 0; (2) there is no label
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
        raise type(problems[0])(f"{len(problems)} problems: {listed}")

"""Errors and warnings. Each error is also the builtin in parentheses, for callers who don't know this library::

    MalAdapterError
    ├── AdapterFormatError (ValueError)
    ├── AdapterNotFoundError (FileNotFoundError)
    ├── AudioError (ValueError)
    │   ├── AudioFormatError
    │   └── AudioTooLongError
    ├── AudioMaskError (ValueError)
    ├── ConfigError (ValueError)
    ├── CopyError (TypeError)
    ├── CorpusError (ValueError)
    ├── EvaluationError (RuntimeError)
    ├── HostError (ValueError)
    ├── HostMismatchError (ValueError)
    ├── HubError (ConnectionError)
    ├── LabelError (ValueError)
    ├── ManifestError (ValueError)
    ├── MetricsError (ValueError)
    ├── MissingDependencyError (ImportError)
    ├── SessionConflictError (RuntimeError)
    ├── SessionError (RuntimeError)
    ├── StateFormatError (ValueError)
    ├── StateMismatchError (ValueError)
    ├── StoreError (OSError)
    ├── StreamError (ValueError)
    ├── TrainingError (RuntimeError)
    └── TurnError (ValueError)

    MalAdapterWarning (UserWarning)
    ├── AudioOutsideSessionWarning
    ├── BaseModelWarning
    ├── IgnoredHookWarning
    ├── IncompleteCorpusWarning
    ├── SharedSpeakersWarning
    ├── SkippedWriteWarning
    ├── UninformativeDataWarning
    └── UnsavedSessionWarning

A message says what was given, what was expected and what to do next.
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
    "MissingDependencyError",
    "SessionConflictError",
    "SessionError",
    "SharedSpeakersWarning",
    "SkippedWriteWarning",
    "StateFormatError",
    "StateMismatchError",
    "StoreError",
    "StreamError",
    "TrainingError",
    "TurnError",
    "UninformativeDataWarning",
    "UnsavedSessionWarning",
    "raise_problems",
]


class MalAdapterError(Exception):
    """Base of all errors of this library."""


class ConfigError(MalAdapterError, ValueError):
    """An argument or a field of a configuration is out of range, or does not fit another one."""


class HostError(MalAdapterError, ValueError):
    """The host's decoder layers, width or audio positions can't be determined, or its answers are not numbers."""


class AudioMaskError(MalAdapterError, ValueError):
    """An audio mask does not fit the hidden states, or the prompt can't be assigned to sessions."""


class SessionError(MalAdapterError, RuntimeError):
    """A session id is not valid, or a session was used in a way that does not determine which memory to use."""


class StateMismatchError(MalAdapterError, ValueError):
    """A memory state belongs to another adapter, or its shapes do not fit this one."""


class StateFormatError(MalAdapterError, ValueError):
    """A file or buffer does not hold a readable memory state."""


class AdapterFormatError(MalAdapterError, ValueError):
    """An adapter folder is incomplete, damaged, or of a format this version can't read."""


class AdapterNotFoundError(MalAdapterError, FileNotFoundError):
    """An adapter folder or Hub repository does not exist, or you may not read it."""


class HubError(MalAdapterError, ConnectionError):
    """The Hugging Face Hub can't be reached, or refused a request."""


class StoreError(MalAdapterError, OSError):
    """A session store can't be reached, or can't save a state."""


class SessionConflictError(MalAdapterError, RuntimeError):
    """Another process or thread has continued this session in the meantime. Its state stays in the store.

    Attributes:
        state: The `MemoryState` that was not saved; you can save it under another session id. None where a store raises
            this error itself.
    """

    state: Any = None


class CopyError(MalAdapterError, TypeError):
    """An object that belongs to this process can't be pickled or copied; the message says what to send instead."""


class HostMismatchError(MalAdapterError, ValueError):
    """An adapter was trained for another kind of host than the one it is attached to."""


class ManifestError(MalAdapterError, ValueError):
    """A line of a dialogue manifest is not valid."""


class CorpusError(MalAdapterError, ValueError):
    """A corpus can't be read from the given folder: files are missing, or have another format."""


class AudioError(MalAdapterError, ValueError):
    """An audio file is missing, unreadable, damaged, empty or silent, or its channels cancel."""


class AudioFormatError(AudioError):
    """A file is not audio, or its format is not supported."""


class AudioTooLongError(AudioError):
    """An utterance is longer than the host's audio encoder accepts; it is never cut silently."""


class LabelError(MalAdapterError, ValueError):
    """A label is not in the label set, or the host can't distinguish two labels."""


class MetricsError(MalAdapterError, ValueError):
    """Answers can't be scored: there are none, or they do not fit the true labels."""


class MissingDependencyError(MalAdapterError, ImportError):
    """A package of an extra is not installed; the message says how to install it. Its import name is `name`."""


class TrainingError(MalAdapterError, RuntimeError):
    """Training can't continue: a loss or gradient is not finite, or a checkpoint does not belong to this run."""


class TurnError(MalAdapterError, ValueError):
    """A turn of a recording is no part of one, or a file of turns can't be read."""


class StreamError(MalAdapterError, ValueError):
    """A live stream's blocks or messages are not what was announced, or the stream has ended."""


class EvaluationError(MalAdapterError, RuntimeError):
    """A folder has no evaluation or another one, or two evaluations are not of the same utterances."""


class MalAdapterWarning(UserWarning):
    """Base of all warnings of this library."""


class SkippedWriteWarning(MalAdapterWarning):
    """A write was skipped since its result was not finite; the state is as before.

    On a GPU it may come one utterance later, and at the latest when the session's block is left.
    """


class AudioOutsideSessionWarning(MalAdapterWarning):
    """Audio passed through a host with an attached memory, but outside a session."""


class BaseModelWarning(MalAdapterWarning):
    """An adapter names another base checkpoint than the host it is attached to."""


class UnsavedSessionWarning(MalAdapterWarning):
    """A store can't be reached. The session continues in this process, and the end of its block tries to save it."""


class IgnoredHookWarning(MalAdapterWarning):
    """The host is already compiled, so it may ignore hooks that are registered now."""


class IncompleteCorpusWarning(MalAdapterWarning):
    """A corpus was read but is not complete: clips are missing, or its counts differ from the published ones."""


class SharedSpeakersWarning(MalAdapterWarning):
    """The same people speak in the training dialogues and in the dev dialogues, or in what the host was trained on."""


class UninformativeDataWarning(MalAdapterWarning):
    """Dialogues can't show what a memory does: no labelled utterance has another utterance before it."""


def raise_problems(problems: Sequence[MalAdapterError]) -> None:
    """Raise all problems as one error, so that one run reports everything that has to be changed.

    Args:
        problems: In the order of the message. An empty sequence raises nothing.

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

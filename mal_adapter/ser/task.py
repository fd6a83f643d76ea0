"""What a recogniser is asked: the labels, and the question behind the audio."""

from collections.abc import Sequence

from mal_adapter.card import AdapterCard
from mal_adapter.ser.labels import DEMO, LabelSet

__all__ = ["choose_task", "default_prompt"]


def choose_task(
    card: AdapterCard | None,
    labels: LabelSet | Sequence[str] | None = None,
    prompt: str | None = None,
    usual: LabelSet = DEMO,
) -> tuple[LabelSet, str]:
    """The labels and the question: as given, else those that the adapter was trained with.

    Args:
        card: the adapter's; None is no adapter.
        labels: the possible answers, where they are not the adapter's. Since its question may name its own labels,
            others bring the default question.
        prompt: the question, where it is not the adapter's.
        usual: the labels where neither is known.

    Raises:
        LabelError: the labels are no label set.

    Example:
        >>> card = AdapterCard(layer_idx=16).with_task(["happy", "sad"], "How does the speaker feel?")
        >>> choose_task(card)[1]
        'How does the speaker feel?'
        >>> choose_task(card, ["angry", "calm"])[1]
        "What is the speaker's emotion? Answer with one word: angry or calm."
        >>> choose_task(card, "angry,calm")
        Traceback (most recent call last):
        mal_adapter.errors.LabelError: the names must be a sequence of strings, got the single string 'angry,calm'
    """
    task = (card.task if card is not None else None) or {}
    if labels is not None:
        # LabelSet makes the tuple, since it refuses a single string; a tuple of its letters would pass.
        chosen = labels if isinstance(labels, LabelSet) else LabelSet(labels)  # type: ignore[arg-type]
        return chosen, prompt if prompt is not None else default_prompt(chosen)
    chosen = LabelSet(tuple(task["labels"]), task.get("aliases", {})) if "labels" in task else usual
    return chosen, prompt if prompt is not None else task.get("prompt") or default_prompt(chosen)


def default_prompt(labels: LabelSet) -> str:
    """The question asked where an adapter brings none.

    Example:
        >>> default_prompt(LabelSet(("neutral", "happy", "sad")))
        "What is the speaker's emotion? Answer with one word: neutral, happy or sad."
    """
    *names, last = labels
    return f"What is the speaker's emotion? Answer with one word: {', '.join(names)} or {last}."

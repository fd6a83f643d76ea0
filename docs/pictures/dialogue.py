"""One dialogue of the demo: pitches, answers without and with memory, and the surprise of each utterance."""

import tempfile
from typing import Any

import style
import torch
from matplotlib.figure import Figure

from mal_adapter.demo import EMOTIONS, PROMPT
from mal_adapter.demo.dialogues import make_dialogue, write_wavs
from mal_adapter.demo.run import load_demo
from mal_adapter.ser.recognizer import EmotionRecognizer, Failure, Prediction

SEED, INDEX = 7, 0
MARKS = {"neutral": "o", "happy": "^", "angry": "D", "sad": "v"}


def measure() -> dict[str, Any]:
    spoken = make_dialogue("test", seed=SEED, index=INDEX)
    torch.manual_seed(0)
    model, processor, memory = load_demo()
    recognizer = EmotionRecognizer(model, processor, memory, EMOTIONS, PROMPT)
    with tempfile.TemporaryDirectory() as folder, memory:
        (dialogue,) = write_wavs([spoken], folder)
        without = [_truth(p) for p in recognizer.without_memory().recognize(dialogue)]
        with_memory, surprise = [], []
        for result in recognizer.recognize(dialogue):
            with_memory.append(_truth(result))
            state = memory.states[dialogue.dialogue_id]
            surprise.append(sum(float(s.square().sum()) for s in state.momentum) ** 0.5)
    return {
        "speaker": "".join("AB"[turn.speaker] for turn in spoken.turns),
        "emotion": [turn.emotion for turn in spoken.turns],
        "pitch_hz": [round(turn.speech.pitch_hz, 1) for turn in spoken.turns],
        "baseline_hz": {name: round(s.pitch_hz, 1) for name, s in zip("AB", spoken.speakers, strict=True)},
        "bare": without,
        "with_memory": with_memory,
        "surprise": [round(s, 3) for s in surprise],
    }


def _truth(result: Prediction | Failure) -> float:
    """The probability of the true emotion."""
    if isinstance(result, Failure):
        raise result.error
    return round(result.probabilities[str(result.utterance.emotion)], 4)


def draw(figures: dict[str, Any]) -> Figure:
    figure, (pitch, probability, surprise) = style.new_figure(9, 6.2, 3, 1, sharex=True, height_ratios=(1.3, 1, 0.8))
    speakers, emotions = figures["speaker"], figures["emotion"]
    turns = list(range(1, len(speakers) + 1))
    colors = [style.SPEAKERS[speaker] for speaker in speakers]

    for name, baseline in figures["baseline_hz"].items():
        pitch.axhline(baseline, color=style.SPEAKERS[name], linewidth=1, linestyle=(0, (4, 3)))
        beside = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        style.note(pitch, f"{name}'s baseline", (1.005, baseline), color=style.SPEAKERS[name], **beside)
    for turn, hz, speaker, emotion, color in zip(turns, figures["pitch_hz"], speakers, emotions, colors, strict=True):
        baseline = figures["baseline_hz"][speaker]
        pitch.plot([turn, turn], [baseline, hz], color=color, linewidth=1, alpha=0.6)
        pitch.plot(turn, hz, MARKS[emotion], color=color, markersize=8)
        below = hz < baseline
        offset, align = ((0, -9), "top") if below else ((0, 8), "bottom")
        pitch.annotate(emotion, (turn, hz), offset, textcoords="offset points", ha="center", va=align, fontsize=8.5)
    low, high = min(figures["pitch_hz"]), max(figures["pitch_hz"])
    pitch.set(ylabel="pitch (Hz)", yscale="log", ylim=(low / 1.2, high * 1.2), xlim=(0.4, len(turns) + 0.6))
    ticks = [hz for hz in (100, 150, 200, 250, 300, 400, 500, 600) if low / 1.2 < hz < high * 1.2]
    pitch.set_yticks(ticks, [str(hz) for hz in ticks])
    pitch.minorticks_off()
    pitch.set_title("Pitch: an emotion is a shift from the speaker's own baseline")

    rows = (("bare", "without memory", style.GREY), ("with_memory", "with memory", style.MEMORY))
    for (key, name, color), shift in zip(rows, (-0.2, 0.2), strict=True):
        probability.bar([t + shift for t in turns], figures[key], width=0.38, color=color, label=name)
    probability.set(ylabel="probability", ylim=(0, 1))
    probability.set_title("Answers: the probability of the true emotion")
    probability.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)

    surprise.bar(turns, figures["surprise"], width=0.6, color=colors)
    surprise.set(ylabel="‖S‖", xlabel="utterance and speaker")
    surprise.set_xticks(turns, [f"{turn}\n{speaker}" for turn, speaker in zip(turns, speakers, strict=True)])
    surprise.set_title("Writes: the surprise that each utterance leaves")
    return figure

"""The published file names of corpora of acted emotions: what each part of a name means."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["SCHEMES", "Scheme"]

_Parts = Mapping[str, str]


@dataclass(frozen=True)
class Scheme:
    """How a corpus names its files.

    Args:
        example: The name of one file, for messages.
        name: A regular expression of the whole name without suffix, or of its end, from a part of the path on. Letter
            case makes no difference. Its groups are the parts.
        emotions: The part `emotion`, in lower case -> the emotion.
        sex: Parts -> "f" or "m".
        speaker, text_id, intensity, emotion: Parts -> that; without, the part of this name.
        problem: (parts, names of the folders above) -> why the file is not wanted, and whether that is expected; or
            None.
        broken: Names without suffix of clips that the release itself has damaged -> how.
    """

    example: str
    name: str
    emotions: Mapping[str, str]
    sex: Callable[[_Parts], str]
    speaker: Callable[[_Parts], str] = lambda parts: parts["speaker"]
    text_id: Callable[[_Parts], str] = lambda parts: parts["text"]
    intensity: Callable[[_Parts], str | None] = lambda parts: None
    emotion: Callable[[_Parts], str] = lambda parts: parts["emotion"]
    problem: Callable[[_Parts, tuple[str, ...]], tuple[str, bool] | None] = lambda parts, folders: None
    broken: Mapping[str, str] = field(default_factory=dict)

    def parse(self, path: str) -> dict[str, str] | None:
        """The parts of a path without suffix, in lower case; None if it has another form."""
        match = re.search(f"(?:^|/)(?:{self.name})\\Z", path, re.IGNORECASE)
        return None if match is None else {part: text.lower() for part, text in match.groupdict().items()}


_RAVDESS_INTENSITY = {"01": "normal", "02": "strong"}


def _not_ravdess_speech(parts: _Parts, folders: tuple[str, ...]) -> tuple[str, bool] | None:
    if parts["channel"] == "02":
        return "it is sung", True
    if parts["modality"] != "03":
        return "it is a video; the file of the sound alone starts with 03", True
    if not 1 <= int(parts["speaker"]) <= 24:
        return "there are actors 01 to 24", False
    return (
        ("neutral has no strong intensity", False) if (parts["emotion"], parts["intensity"]) == ("01", "02") else None
    )


#: Actors 10NN.
_CREMAD_WOMEN = (
    2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 18, 20, 21, 24, 25, 28, 29, 30, 37, 43, 46, 47, 49, 52, 53, 54, 55, 56, 58,
    60, 61, 63, 72, 73, 74, 75, 76, 78, 79, 82, 84, 89, 91,
)  # fmt: skip
_CREMAD_INTENSITY = {"lo": "low", "md": "medium", "hi": "high"}

_ESD_EMOTIONS = ("neutral", "angry", "happy", "sad", "surprise")
#: 0001 to 0010 speak Mandarin, 0011 to 0020 English.
_ESD_WOMEN = (1, 2, 3, 7, 9, 15, 16, 17, 18, 19)
#: Every speaker says the same 350 sentences of a language in each emotion, numbered one emotion after the other.
_ESD_SENTENCES = 350


def _esd_emotion(parts: _Parts) -> str:
    return _ESD_EMOTIONS[(int(parts["number"]) - 1) // _ESD_SENTENCES]


def _not_esd(parts: _Parts, folders: tuple[str, ...]) -> tuple[str, bool] | None:
    last = _ESD_SENTENCES * len(_ESD_EMOTIONS)
    if not 1 <= int(parts["number"]) <= last:
        return f"the numbers are 000001 to {last:06d}", False
    said = [folder.lower() for folder in folders if folder.lower() in _ESD_EMOTIONS]
    if said and said[-1] != _esd_emotion(parts):
        return f"its folder says {said[-1]}, its number {_esd_emotion(parts)}", False
    return None


#: The corpora that `read_clips` knows by name.
SCHEMES: Mapping[str, Scheme] = {
    # Livingstone and Russo (2018): modality-channel-emotion-intensity-statement-repetition-actor; odd actors are men.
    "ravdess": Scheme(
        "03-01-06-01-02-01-12.wav",
        r"(?P<modality>0[123])-(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])-(?P<text>0[12])-"
        r"(?P<repetition>0[12])-(?P<speaker>\d\d)",
        dict(zip(
            ("01", "02", "03", "04", "05", "06", "07", "08"),
            ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise"),
            strict=True,
        )),
        sex=lambda parts: "mf"[int(parts["speaker"]) % 2 == 0],
        intensity=lambda parts: _RAVDESS_INTENSITY[parts["intensity"]],
        problem=_not_ravdess_speech,
    ),
    # Cao et al. (2014): actor_sentence_emotion_intensity; one file has the intensity X. The sexes are those of
    # VideoDemographics.csv.
    "cremad": Scheme(
        "1001_DFA_ANG_XX.wav",
        "(?P<speaker>10[0-8][0-9]|109[01])_(?P<text>IEO|TIE|IOM|IWW|TAI|MTI|IWL|ITH|DFA|ITS|TSI|WSI)_"
        "(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?P<intensity>LO|MD|HI|XX?)",
        {"ang": "angry", "dis": "disgust", "fea": "fear", "hap": "happy", "neu": "neutral", "sad": "sad"},
        sex=lambda parts: "f" if int(parts["speaker"]) - 1000 in _CREMAD_WOMEN else "m",
        intensity=lambda parts: _CREMAD_INTENSITY.get(parts["intensity"]),
        problem=lambda parts, folders: ("there are actors 1001 to 1091", False) if parts["speaker"] == "1000" else None,
        broken={
            "1076_mti_sad_xx": "the clip is silent in the release",
            "1064_tie_sad_xx": "the clip is empty in the release",
            "1064_ieo_dis_md": "the release's file has the sentence in all emotions",
        },
    ),
    # Burkhardt et al. (2005): speaker, sentence, emotion (in German), version.
    "emodb": Scheme(
        "03a01Fa.wav",
        "(?P<speaker>03|08|09|1[0-6])(?P<text>[ab][01][0-9])(?P<emotion>[WLEAFTN])(?P<version>[a-z])",
        {"w": "angry", "l": "boredom", "e": "disgust", "a": "fear", "f": "happy", "t": "sad", "n": "neutral"},
        sex=lambda parts: "m" if parts["speaker"] in ("03", "10", "11", "12", "15") else "f",
    ),
    # Pichora-Fuller and Dupuis (2010): speaker_word_emotion; ps is pleasant surprise. One file lacks an F.
    "tess": Scheme(
        "OAF_back_angry.wav",
        "(?P<speaker>OAF?|YAF)_(?P<text>[a-z']+)_(?P<emotion>angry|disgust|fear|happy|neutral|ps|sad)",
        {"ps": "surprise"} | {name: name for name in ("angry", "disgust", "fear", "happy", "neutral", "sad")},
        sex=lambda parts: "f",
        speaker=lambda parts: parts["speaker"][0] + "af",
    ),
    # Jackson and Haq (2014): speaker/emotion and sentence, or joined by _. Most sentences belong to one emotion, so the
    # sentence has the emotion in its name.
    "savee": Scheme(
        "DC/a01.wav or DC_a01.wav",
        r"(?P<speaker>DC|JE|JK|KL)[_/](?P<emotion>sa|su|[adfhn])(?P<text>\d\d)",
        {"a": "angry", "d": "disgust", "f": "fear", "h": "happy", "n": "neutral", "sa": "sad", "su": "surprise"},
        sex=lambda parts: "m",
        text_id=lambda parts: parts["emotion"] + parts["text"],
    ),
    # Zhou et al. (2021): speaker_number, in folders named after the emotion.
    "esd": Scheme(
        "0011_000351.wav",
        r"(?P<speaker>00(?:0[1-9]|1\d|20))_(?P<number>\d{6})",
        {name: name for name in _ESD_EMOTIONS},
        sex=lambda parts: "f" if int(parts["speaker"]) in _ESD_WOMEN else "m",
        text_id=lambda parts: (
            f"{'zh' if parts['speaker'] <= '0010' else 'en'}{(int(parts['number']) - 1) % _ESD_SENTENCES + 1:03d}"
        ),
        emotion=_esd_emotion,
        problem=_not_esd,
    ),
}  # fmt: skip

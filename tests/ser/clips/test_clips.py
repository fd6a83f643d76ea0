"""Readers of single clips: published names, patterns, and what is left out."""

import re
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mal_adapter.errors import ConfigError, CorpusError, IncompleteCorpusWarning
from mal_adapter.ser.clips import SCHEMES, Clip, read_clips, read_pattern
from mal_adapter.ser.clips.pattern import compiled_pattern
from tests.ser.made_clips import RAVDESS_EMOTIONS, make_ravdess, make_sound

#: corpus -> path, (speaker, emotion, sex, sentence, intensity)
PUBLISHED = {
    "ravdess": [
        ("Actor_12/03-01-06-01-02-01-12.wav", ("ravdess-12", "fear", "f", "02", "normal")),
        ("Actor_01/03-01-02-02-01-02-01.wav", ("ravdess-01", "calm", "m", "01", "strong")),
    ],
    "cremad": [
        ("AudioWAV/1001_DFA_ANG_XX.wav", ("cremad-1001", "angry", "m", "dfa", None)),
        ("AudioWAV/1002_IEO_SAD_HI.wav", ("cremad-1002", "sad", "f", "ieo", "high")),
        ("AudioWAV/1091_WSI_NEU_X.wav", ("cremad-1091", "neutral", "f", "wsi", None)),
    ],
    "emodb": [
        ("wav/03a01Fa.wav", ("emodb-03", "happy", "m", "a01", None)),
        ("wav/16b10Lb.wav", ("emodb-16", "boredom", "f", "b10", None)),
    ],
    "tess": [
        ("OAF_angry/OAF_back_angry.wav", ("tess-OAF", "angry", "f", "back", None)),
        ("YAF_pleasant_surprised/YAF_food_ps.wav", ("tess-YAF", "surprise", "f", "food", None)),
        ("OAF_neutral/OA_bite_neutral.wav", ("tess-OAF", "neutral", "f", "bite", None)),
    ],
    "savee": [
        ("AudioData/DC/sa03.wav", ("savee-DC", "sad", "m", "sa03", None)),
        ("ALL/KL_su12.wav", ("savee-KL", "surprise", "m", "su12", None)),
    ],
    "esd": [
        ("0001/Neutral/0001_000350.wav", ("esd-0001", "neutral", "f", "zh350", None)),
        ("0020/Angry/train/0020_000351.wav", ("esd-0020", "angry", "m", "en001", None)),
        ("0011/Surprise/0011_001750.wav", ("esd-0011", "surprise", "m", "en350", None)),
    ],
}


def said(clip: Clip) -> tuple[str | None, ...]:
    return clip.speaker, clip.emotion, clip.sex, clip.text_id, clip.intensity


@pytest.mark.parametrize("corpus", SCHEMES)
def test_published_names_say_what_the_corpus_says(corpus: str, tmp_path: Path):
    for path, _ in PUBLISHED[corpus]:
        make_sound(tmp_path / path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_clips(corpus, tmp_path)
    assert {clip.path.relative_to(tmp_path).as_posix(): said(clip) for clip in found.clips} == dict(PUBLISHED[corpus])
    assert found.left_out == {}


@pytest.mark.parametrize("corpus", SCHEMES)
def test_letter_case_makes_no_difference(corpus: str, tmp_path: Path):
    path, expected = PUBLISHED[corpus][0]
    make_sound(tmp_path / path.upper())
    assert [said(clip) for clip in read_clips(corpus.upper(), tmp_path).clips] == [expected]


WRONG = {
    "ravdess": ("03-01-09-01-02-01-12.wav", "03-01-01-02-01-01-01.wav", "03-01-03-01-01-01-25.wav", "03-01-03.wav"),
    "cremad": ("1001_DFA_ANG.wav", "1092_DFA_ANG_XX.wav", "1000_DFA_ANG_XX.wav", "1001_XYZ_ANG_XX.wav"),
    "emodb": ("04a01Fa.wav", "03a01Xa.wav", "03a01F.wav", "x03a01Fa.wav"),
    "tess": ("OAF_back_bored.wav", "MAF_back_angry.wav", "OAF_angry.wav"),
    "savee": ("XX_a01.wav", "a01.wav", "DC_b01.wav"),
    "esd": ("0021_000001.wav", "0000_000001.wav", "0001_001751.wav", "0001_000000.wav", "Sad/0001_000001.wav"),
}


@pytest.mark.parametrize(("corpus", "name"), [(corpus, name) for corpus, names in WRONG.items() for name in names])
def test_other_names_are_reported(corpus: str, name: str, tmp_path: Path):
    make_sound(tmp_path / PUBLISHED[corpus][0][0])
    make_sound(tmp_path / name)
    with pytest.warns(IncompleteCorpusWarning, match=re.escape(name)):
        found = read_clips(corpus, tmp_path)
    assert (list(found.left_out), found.known, len(found.clips)) == ([name], frozenset(), 1)


def test_songs_videos_copies_and_clips_damaged_in_the_release_are_left_out_without_a_warning(tmp_path: Path):
    names = ["03-01-03-01-01-01-01.wav", "03-02-03-01-01-01-01.wav", "01-01-03-01-01-01-01.wav"]
    for name in names:
        make_sound(tmp_path / name)
    make_sound(tmp_path / "again" / names[0])
    make_sound(tmp_path / "again" / names[0].replace(".wav", ".flac"))
    make_sound(tmp_path / "cremad" / "1076_MTI_SAD_XX.wav")
    make_sound(tmp_path / "cremad" / "1076_MTI_NEU_XX.wav")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cremad = read_clips("CREMA-D", tmp_path / "cremad")
    assert [clip.path.name for clip in cremad.clips] == ["1076_MTI_NEU_XX.wav"]
    with pytest.warns(IncompleteCorpusWarning):  # cremad's names are not RAVDESS's
        found = read_clips("ravdess", tmp_path)
    assert [clip.path for clip in found.clips] == [tmp_path / names[0]]
    copies = {f"again/{names[0]}", f"again/{names[0]}".replace(".wav", ".flac")}
    assert found.known == {*names[1:], *copies}


def test_of_two_clips_with_one_name_and_other_sound_one_is_reported(tmp_path: Path):
    make_sound(tmp_path / "03a01Fa.wav", 0.1)
    make_sound(tmp_path / "more" / "03a01Fa.wav", 0.2)
    with pytest.warns(IncompleteCorpusWarning, match="other sound"):
        assert list(read_clips("emodb", tmp_path).left_out) == ["more/03a01Fa.wav"]


def test_files_that_are_no_sound_are_reported(tmp_path: Path):
    make_sound(tmp_path / "03a01Fa.wav")
    (tmp_path / "03a01Fb.wav").write_bytes(b"")
    (tmp_path / "03a01Fc.wav").write_bytes(b"this is text")
    (tmp_path / "erkennung.txt").write_text("no sound at all")
    with pytest.warns(IncompleteCorpusWarning, match="2 files"):
        found = read_clips("emodb", tmp_path)
    assert found.left_out == {
        "03a01Fb.wav": "the file is empty",
        "03a01Fc.wav": "the file can not be read as audio",
    }


def test_a_folder_of_another_corpus_is_an_error_that_says_what_is_there(tmp_path: Path):
    make_sound(tmp_path / "OAF_back_angry.wav")
    with pytest.raises(CorpusError, match=r"03-01-06-.*1 other sound files are there, such as OAF_back_angry.wav"):
        read_clips("ravdess", tmp_path)
    with pytest.raises(CorpusError, match="known are ravdess, cremad"):
        read_clips("iemocap", tmp_path)


def test_ravdess_is_whole(tmp_path: Path):
    found = read_clips("ravdess", make_ravdess(tmp_path))
    assert len(found.clips) == 1440
    assert {clip.emotion for clip in found.clips} == set(RAVDESS_EMOTIONS)
    assert "24 speakers (12 m, 12 f)" in str(found)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("{speaker}/{emotion}_{text}.wav", "Anna/sad_01.wav", ("c-Anna", "sad", None, "01", None)),
        ("{speaker}/{emotion}_{}.wav", "Anna/very sad_01.02.WAV", ("c-Anna", "very sad", None, None, None)),
        ("{sex}-{speaker}-{emotion}-{intensity}", "F-1-sad-high.flac", ("c-1", "sad", "f", None, "high")),
        ("{speaker}/{speaker}_{emotion}.wav", "B/B_sad.wav", ("c-B", "sad", None, None, None)),
        ("{speaker:2}{text:3}{emotion:1}{}.wav", "03a01Fa.wav", ("c-03", "F", None, "a01", None)),
        ("./{}/{speaker}/{}-{emotion}.wav", "x/1/y-sad.wav", ("c-1", "sad", None, None, None)),
    ],
)
def test_patterns(pattern: str, path: str, expected: tuple[str | None, ...], tmp_path: Path):
    make_sound(tmp_path / path)
    assert [said(clip) for clip in read_pattern(tmp_path, pattern, "c").clips] == [expected]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{speaker}.wav", "no {emotion}"),
        ("{emotion}.wav", "no {speaker}"),
        ("{speaker}{emotion}.wav", "side by side"),
        ("{speaker}_{mood}.wav", "'mood'"),
        ("{speaker_{emotion}.wav", "not one"),
        ("{speaker:x}_{emotion}.wav", "'x'"),
        ("{speaker:0}_{emotion}.wav", "'0'"),
    ],
)
def test_wrong_patterns(pattern: str, message: str):
    with pytest.raises(ConfigError, match=message):
        compiled_pattern(pattern)


def test_paths_that_do_not_fit_the_pattern_are_reported(tmp_path: Path):
    for path in ("Anna/sad_1.wav", "Anna/sad.wav", "sad_1.wav", "x/Anna/sad_1.wav"):
        make_sound(tmp_path / path)
    with pytest.warns(IncompleteCorpusWarning, match="3 files"):
        found = read_pattern(tmp_path, "{speaker}/{emotion}_{}.wav")
    assert [clip.path.name for clip in found.clips] == ["sad_1.wav"]
    assert set(found.left_out) == {"Anna/sad.wav", "sad_1.wav", "x/Anna/sad_1.wav"}


words = st.text("abcäß1é", min_size=1, max_size=6)


@given(speaker=words, emotion=words, text=words)
def test_a_pattern_reads_what_was_written_with_it(speaker: str, emotion: str, text: str):
    found = compiled_pattern("{speaker}/{emotion}_{text}.wav").fullmatch(f"{speaker}/{emotion}_{text}.wav")
    assert found is not None
    assert found.groupdict() == {"speaker": speaker, "emotion": emotion, "text": text}

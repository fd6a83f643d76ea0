"""An opened sound file of a format that libsndfile reads: any part of it, in blocks of bounded size."""

from bisect import bisect_right
from collections.abc import Iterator
from operator import itemgetter
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from mal_adapter.ser.recognizer.sound.layout import UNKNOWN_END, Layout, cut_short
from mal_adapter.ser.recognizer.sound.mpeg import start_patches
from mal_adapter.ser.recognizer.sound.source import DamagedSoundError, View

__all__ = ["BLOCK", "TOLERANCE_S", "Block", "Sound", "UnknownFormatError", "reason_of"]

#: Rounding, in seconds: how far an utterance may exceed its file, and a file be shorter than its header says.
TOLERANCE_S = 0.1
#: How many samples, of all channels together, are decoded at once.
BLOCK = 1 << 17
#: Decoders of these formats need so many seconds before a part, to give the same samples as from the start.
PREROLL_S = {"OGG": 1.0, "MP3": 1.0, "MPEG": 1.0}
LOSSY = {"GSM610", "G721_32", "G723_24", "G723_40", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32", "VOX_ADPCM"}
RATES = (1_000, 1_000_000)

Block = npt.NDArray[np.float32]  # (frames, channels)


class UnknownFormatError(DamagedSoundError):
    """The file is of no format that can be read here."""


class _Decoder(soundfile.SoundFile):
    def seekable(self) -> bool:
        """False; else soundfile would seek after each block, and read no more than the header declares."""
        return False


class Sound:
    """The samples of a sound file.

    Args:
        file: Opened in binary mode.
        layout: Its format and length.

    Raises:
        DamagedSoundError: The file can't be decoded, or has less or more samples than it declares.
    """

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self._file = file
        self._layout = layout
        self._decoder, self._view = self._open(layout)
        self.sampling_rate: int = self._decoder.samplerate
        self.channels: int = self._decoder.channels
        self.frames: int = self._decoder.frames if layout.frames is None else layout.frames
        self.format: str = self._decoder.format
        #: Whether the format keeps a constant only roughly.
        self.lossy: bool = self.format in PREROLL_S or self._decoder.subtype in LOSSY
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    @property
    def duration_s(self) -> float:
        return self.frames / self.sampling_rate

    def blocks(self, first: int, last: int) -> Iterator[Block]:
        """Decode the frames `first` to `last` in blocks, of which the last may be shorter.

        Raises:
            DamagedSoundError: The frames can not be decoded, or the file has more than it declares.
        """
        position, at_entry = self._seek(max(0, first - round(PREROLL_S.get(self.format, 0.0) * self.sampling_rate)))
        while position < last:
            block = self._read(min(max(1, BLOCK // self.channels), last - position))
            if len(block) == 0:
                raise DamagedSoundError(
                    f"the file is damaged: {position / self.sampling_rate:.2f} s of {self.duration_s:.2f} s can be "
                    "decoded; copy it again"
                )
            skipped = max(0, first - position)
            position += len(block)
            if skipped < len(block):
                yield block[skipped:]
        if last == self.frames and not at_entry and self._has_more():
            raise DamagedSoundError(
                f"the file holds more than the {self.duration_s:.2f} s that its header declares; convert it again"
            )

    def close(self) -> None:
        self._decoder.close()
        self._file.close()

    def _has_more(self) -> bool:
        """Whether another frame can be decoded. Bytes that can't be decoded may be padding."""
        try:
            return len(self._read(1)) > 0
        except DamagedSoundError:
            return False

    def _open(self, layout: Layout) -> tuple[_Decoder, View]:
        view = View(self._file, layout.start, layout.end, layout.patches)
        try:
            decoder = _Decoder(view)
        except Exception as error:  # soundfile's own, and TypeError or ValueError for absurd headers
            raise UnknownFormatError(reason_of(view.error or error)) from error
        if decoder.format not in layout.formats or (
            decoder.subtype.startswith("MPEG_") and decoder.format != "MP3"  # in WAV, whose length would be a guess
        ):
            decoder.close()
            raise UnknownFormatError(f"{decoder.subtype_info} in {decoder.format_info}")
        return decoder, view

    def _check(self) -> None:
        layout, rate = self._layout, self.sampling_rate
        if not RATES[0] <= rate <= RATES[1]:
            raise DamagedSoundError(f"a sampling rate of {rate} Hz is not one of sound; convert it again")
        declared_s = self.duration_s if layout.declared_frames is None else layout.declared_frames / rate
        if layout.present < layout.declared:
            declared_s = max(declared_s, self.duration_s * layout.declared / max(1, layout.present))
        if declared_s - self.duration_s > TOLERANCE_S:
            raise DamagedSoundError(cut_short(self.duration_s, declared_s))
        beyond_s = self.duration_s * layout.beyond / max(1, layout.present)
        if beyond_s > TOLERANCE_S:
            raise DamagedSoundError(
                f"the file holds about {beyond_s:.2f} s more than the {self.duration_s:.2f} s of its header, as if "
                "the recorder had not closed it; repair it, for example with "
                "ffmpeg -ignore_length 1 -i in.wav out.wav"
            )

    def _seek(self, frame: int) -> tuple[int, bool]:
        """Go to a frame, or to one before it.

        Returns:
            (the decoder's position, whether it started at one of the layout's places). From such a place, the decoder
            also gives the padding at the end.
        """
        entry = bisect_right(self._layout.places, frame, key=itemgetter(0)) - 1
        if entry >= 0:
            position, offset = self._layout.places[entry]
            patches = start_patches(self._file, offset)
            self._reopen(self._layout._replace(start=offset, end=UNKNOWN_END, patches=patches))
            return position, True
        if frame > 0 and not self._layout.places:
            try:
                return int(self._decoder.seek(frame)), False
            except Exception:  # "Seek attempted on unseekable file type": GSM 6.10 and G.72x
                self._reopen(self._layout)
        return 0, False

    def _reopen(self, layout: Layout) -> None:
        self._decoder.close()
        self._decoder, self._view = self._open(layout)

    def _read(self, frames: int) -> Block:
        block = np.empty((frames, self.channels), dtype=np.float32)
        try:
            count = self._decoder.buffer_read_into(block, dtype="float32")
        except Exception as error:
            reason = f"the audio can not be decoded ({reason_of(error)}); convert or copy it again"
            raise DamagedSoundError(reason) from error
        if self._view.error is not None:
            raise DamagedSoundError(f"the file can not be read ({reason_of(self._view.error)}); copy it again")
        return block[:count]


def reason_of(error: Exception) -> str:
    """What an exception says, for a message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.rsplit(": ", maxsplit=1)[-1].strip().rstrip(".") or type(error).__name__

"""The decoding layer: the length of a sound file, and the samples of any part of it, in blocks of bounded size.

`mal_adapter.ser.recognizer.audio` is what other modules use. Each module here imports only from those before it:

    source      the file's bytes, as libsndfile should see them
    tags        ID3, Lyrics3 and APE tags before and after the sound
    chunks      WAV, RF64, W64, AIFF, AU, CAF, NIST: the size of the samples against the size of the file
    flac        the number of samples, from the last frame
    mpeg        the number of samples, from all frames' headers
    ogg         pages that are damaged or missing
    kept        what was measured of a file
    layout      the format of a file, and the samples in it
    reader      opened sound files: blocks of any part
    ffmpeg      the same for what browsers and phones record
    opening     the reader of a file's format
    levels      silence, and channels that cancel
"""

__all__ = [
    "chunks",
    "ffmpeg",
    "flac",
    "kept",
    "layout",
    "levels",
    "mpeg",
    "ogg",
    "opening",
    "reader",
    "source",
    "tags",
]

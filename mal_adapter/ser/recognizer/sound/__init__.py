"""The decoding layer: the length of a sound file, and the samples of any part of it, in blocks of bounded size.

`mal_adapter.ser.recognizer.audio` is what other modules use. Each module here imports only from those before it:

    source      the file's bytes, as libsndfile should see them
    tags        ID3, Lyrics3 and APE tags before and after the sound
    chunks      WAV, RF64, W64, AIFF, AU, CAF, NIST: the size of the samples against the size of the file
    flac        the number of samples, from the last frame
    mpeg        the number of samples, from all frames' headers
    ogg         pages that are damaged or missing
    layout      the format of a file, and the samples in it
    reader      opened sound files: blocks of any part
    levels      silence, and channels that cancel
"""

__all__ = ["chunks", "flac", "layout", "levels", "mpeg", "ogg", "reader", "source", "tags"]

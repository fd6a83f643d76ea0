"""The decoding layer: how much sound a file holds, and the samples of any part of it, in blocks of bounded size.

`mal_adapter.ser.recognizer.audio` is its door. Each module imports only from those before it:

    source      the file's bytes, as libsndfile is to see them
    tags        ID3, Lyrics3 and APE tags before and after the sound
    chunks      WAV, RF64, W64, AIFF, AU, CAF, NIST: the size of the samples against the size of the file
    flac        the number of samples, from the last frame
    mpeg        the number of samples, from all frames' headers
    ogg         pages that are damaged or missing
    layout      which of these a file is, and what it holds
    reader      opened sound files: blocks of any part
    levels      silence, and channels that cancel
"""

__all__ = ["chunks", "flac", "layout", "levels", "mpeg", "ogg", "reader", "source", "tags"]

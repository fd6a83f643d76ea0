"""The tiny host of tests/ser, for commands."""

from tests.ser.fixtures import make_dialogue, model, processor, write_audio  # noqa: F401

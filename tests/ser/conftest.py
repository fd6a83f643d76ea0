"""The fixtures of tests/ser; other folders import them from the same module."""

from tests.ser.fixtures import make_dialogue, model, processor, write_audio  # noqa: F401

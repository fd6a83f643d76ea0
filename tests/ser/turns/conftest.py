"""Speech that is made on the spot, by espeak-ng."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import soxr

WORDS = (
    "Good morning, this is a call about the invoice of last month. I have read it twice, and I do not understand it."
)


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[np.float32]:
    """Some six seconds of speech at 16 kHz."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    path = Path(tmp_path_factory.mktemp("spoken") / "spoken.wav")
    subprocess.run(["espeak-ng", "-v", "en", "-w", str(path), WORDS], check=True)
    samples, rate = soundfile.read(path, dtype="float32")
    return np.asarray(soxr.resample(samples, rate, 16_000), dtype=np.float32)

"""What of the demo runs where: anybody runs it, we train it."""

import pytest
import transformers

IN_TRAINING = pytest.mark.skipif(
    transformers.__version__ < "5", reason="the demo's files are trained with the modules of transformers 5"
)

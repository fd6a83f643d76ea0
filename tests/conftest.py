"""One thread per process: tests run beside each other on few cores, and results do not depend on the machine's size."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

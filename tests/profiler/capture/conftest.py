"""Tiny models run on one thread: starting others takes longer than the work, and much longer on a busy machine."""

import torch

torch.set_num_threads(1)

"""One thread, as ratios are committed for: they depend on how many there are."""

import torch

torch.set_num_threads(1)

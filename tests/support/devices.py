"""Where the kernels run in tests."""

import torch

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # for real, or interpreted

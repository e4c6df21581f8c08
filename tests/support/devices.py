"""Where the kernels run in this test run: for real on a GPU, or interpreted."""

import torch

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

"""Settings of the whole suite."""

from __future__ import annotations

import os

import torch
from s3_server import faults, s3_server, s3_url

__all__ = ["faults", "s3_server", "s3_url"]

# Tiny models gain nothing from threads, and lose a lot to each other's where the suite shares two cores.
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

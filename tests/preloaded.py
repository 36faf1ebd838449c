"""Imports everything that the scripts import; process_pool.py forks from a server that has imported this."""

from __future__ import annotations

import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch.distributed  # noqa: F401
from transformers import GPTNeoXForCausalLM, Qwen2ForCausalLM  # noqa: F401

from steps import load_script
from utils.paths import PAPER_TABLES, STEP_0, STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, STEP_6

for script in (STEP_0, STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, *STEP_6.values(), PAPER_TABLES):
    load_script(script)

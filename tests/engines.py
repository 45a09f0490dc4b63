"""What the tests of engines share: the words that a launcher leaves in the environment, and who needs DeepSpeed."""

import importlib.util

import pytest

FLAG, FILE, STAGE, STEPS = (
    f"ACCELERATE_{name}"
    for name in ("USE_DEEPSPEED", "DEEPSPEED_CONFIG_FILE", "DEEPSPEED_ZERO_STAGE", "GRADIENT_ACCUMULATION_STEPS")
)

deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed")

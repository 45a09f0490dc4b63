"""What a launcher says of engine, precision and accumulation, and which of DeepSpeed's settings no engine follows."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from engines import FILE, FLAG, STAGE, STEPS

from ppreid_dist.errors import ConfigError
from ppreid_dist.training.launcher import Launched


@pytest.mark.parametrize(
    ("said", "settings", "agreed"),
    [
        ({}, ("auto", "auto", 0), ("ddp", "no", 1)),
        ({}, ("ddp", "bf16", 3), ("ddp", "bf16", 3)),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ("auto", "auto", 0), ("ddp", "bf16", 1)),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "NO"}, ("auto", "auto", 0), ("ddp", "no", 1)),
        ({"ACCELERATE_MIXED_PRECISION": "no", STEPS: "1"}, ("zero1", "bf16", 2), ("zero1", "bf16", 2)),
        (
            {FLAG: "true", STAGE: "3", STEPS: "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
            ("auto", "auto", 0),
            ("zero3", "bf16", 2),
        ),
        ({FLAG: "true", STAGE: "2"}, ("zero2", "no", 0), ("zero2", "no", 1)),
        ({FLAG: "true", FILE: str(ROOT / "configs/deepspeed/zero1.json")}, ("auto", "auto", 0), ("zero1", "no", 1)),
    ],
)
def test_auto_takes_the_launcher_s_word(
    said: dict[str, str], settings: tuple[str, str, int], agreed: tuple[str, str, int]
) -> None:
    assert Launched.read(said).agreed(*settings) == agreed


@pytest.mark.parametrize(
    ("said", "settings", "message"),
    [
        (
            {FLAG: "true", STAGE: "2"},
            ("zero3", "auto"),
            "configuration says zero3 but the launcher says zero2",
        ),
        ({FLAG: "true", STAGE: "2"}, ("ddp", "auto"), "engine.kind: the configuration says ddp"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ("auto", "no"), "engine.precision: the configuration says no"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ("auto", "auto"), "engine.precision: the launcher says fp16"),
        ({FLAG: "true", STAGE: "0"}, ("auto", "auto"), "zero_optimization.stage: 1, 2 or 3"),
        ({FLAG: "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, ("auto", "auto"), "offload"),
        ({FLAG: "true", FILE: "/nowhere.json"}, ("auto", "auto"), "/nowhere.json: no such file"),
        (
            {
                FLAG: "true",
                FILE: str(ROOT / "configs/deepspeed/zero1.json"),
                "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage",
            },
            ("auto", "auto"),
            "zero1.json: say zero_stage there",
        ),
        ({STEPS: "4"}, ("auto", "auto"), "engine.accumulate: the configuration says 2 but the launcher says 4"),
        ({STEPS: "1.5"}, ("auto", "auto"), "engine.accumulate: the launcher's gradient_accumulation_steps is 1.5"),
        ({STEPS: "0"}, ("auto", "auto"), "engine.accumulate: the launcher's gradient_accumulation_steps is 0"),
        ({"ACCELERATE_USE_FSDP": "true"}, ("auto", "auto"), "engine.kind: the launcher says FSDP; there are ddp, "),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ("auto", "auto"), "engine.kind: the launcher says Megatron-LM"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ("auto", "auto"), "engine.compile: the launcher says inductor"),
    ],
)
def test_contradictions(said: dict[str, str], settings: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Launched.read(said).agreed(*settings, 2)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"bf16": {"enabled": True}}, "bf16: it rounds weights"),
        ({"fp16": {"enabled": True}}, "fp16: there is no loss scaling"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype: only bfloat16"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: every player has its own"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: every player has its own"),
        ({"train_batch_size": 64}, "train_batch_size, .*: auto"),
        ({"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}}, "lower_precision_safe_modules: "),
        ({"communication_data_type": "bf16"}, "communication_data_type: gradients are summed"),
        ({"amp": {"enabled": True}}, "amp: use torch_autocast"),
        ({"compute_grad_norm": False}, "compute_grad_norm: by the norm"),
        ({"bf16": True}, "bf16: not a section of settings"),
        ({"zero_optimization": None}, "zero_optimization: not a section of settings"),
        ({"zero_optimization": {"stage": 2, "offload_param": "none"}}, r"offload_param: not a section of settings"),
        ({"gradient_accumulation_steps": [1]}, r"engine\.accumulate: .*_steps is \[1\], not a number from 1"),
        ({"gradient_accumulation_steps": 1.5}, r"engine\.accumulate: .*_steps is 1\.5, not a number from 1"),
        ({"gradient_clipping": [1]}, "gradient_clipping: a number, or auto"),
        ({"gradient_clipping": None}, "gradient_clipping: a number, or auto"),
    ],
)
def test_deepspeed_settings_that_no_engine_follows(tmp_path: Path, section: dict[str, object], message: str) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | section))
    with pytest.raises(ConfigError, match=message):
        Launched.read({FLAG: "true", FILE: str(file)})


def test_an_offload_of_nothing_is_as_if_it_were_not_said(tmp_path: Path) -> None:
    """Accelerate asks what it says for a device."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": None, "offload_param": {}}}))
    said = Launched.read({FLAG: "true", FILE: str(file)}).deepspeed
    assert said == {"zero_optimization": {"stage": 2, "offload_param": {}}}


def test_two_precisions_of_one_launcher(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    said = {FLAG: "true", FILE: str(file), "ACCELERATE_MIXED_PRECISION": "bf16"}
    for enabled, precision in ((True, "bf16"), ("false", None)):
        section = {"torch_autocast": {"enabled": enabled, "dtype": "bfloat16"}}
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | section))
        if precision is None:
            with pytest.raises(ConfigError, match=r"^engine\.precision: .* bf16, its DeepSpeed settings say no"):
                Launched.read(said)
        else:
            assert Launched.read(said).precision == precision

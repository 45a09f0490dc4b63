"""What the commands say: to mistakes, to --help, of a sweep's words, and that the README's are understood."""

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import pytest
from commands import ppreid
from conftest import ROOT

from ppreid_dist.cli import _say
from ppreid_dist.data.dataset import open_split
from ppreid_dist.errors import DataError
from ppreid_dist.experiment import Config
from ppreid_dist.settings import load_settings


@pytest.mark.parametrize(
    "output", ["/proc/none/run", "README.md", "README.md/run", 256 * "x", "{}/link", "{}/link/run"]
)
def test_a_training_that_could_not_be_kept_is_refused_at_once(world: list[str], tmp_path: Path, output: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    output = output.format(tmp_path)
    said = ppreid("train", *world, f"output={output}", expect=2).stderr
    assert re.search(rf"^error: {output}: can't be written to: [^\n]+\n$", said, re.MULTILINE)


def test_what_is_said_may_hold_a_name_of_any_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    _say("größer \udcff")
    assert capsys.readouterr().out == "größer \\udcff\n"


def test_an_interrupted_command_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ppreid_dist.reporting.report.report", interrupted)
    assert ppreid("report", "runs", expect=130).stderr == "interrupted; what is finished is kept\n"


def test_doctor_finds_this_installation_sound() -> None:
    said = ppreid("doctor").stdout
    assert "FAIL" not in said and re.search(r"ok +torch: 2\.", said)
    for operation in ("adam: fused", "clip: foreach", "cross_entropy: plain", r"ssim: \w+", r"batch_hard: \w+"):
        assert re.search(rf"ok +kernels\.{operation} \(.+\)", said)


def test_the_commands_stand_in_a_column() -> None:
    said = ppreid("--help").stdout.partition("commands (each has --help):\n")[2].splitlines()
    assert len({re.match(r"  \S+ +", line).end() for line in said}) == 1  # type: ignore[union-attr]


def test_shards_without_people_for_attackers_say_so_before_training(
    world: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    people = "{train: 12, unlabelled: 0, aux: 0, test: 2, cameras: 2, shots: 2, height: 32, width: 16}"
    here = [*world, f"data.root={tmp_path / 'pictures'}", f"data.shards={tmp_path / 's'}", f"data.synthetic={people}"]
    config = load_settings(Config, None, here)
    with caplog.at_level("WARNING"):
        ppreid("shards", *here)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "no split 'aux'" in said and "data.synthetic.aux=N" in said
    with pytest.raises(DataError, match=r"s: has no split 'aux': .* data\.synthetic\.aux=N"):
        open_split(config.data, "aux")


@pytest.mark.parametrize("command", ["shards", "train", "attack"])
def test_help_shows_every_default(command: str) -> None:
    said = ppreid(command, "--help").stdout
    assert "privacy.weight=1.0" in said and "data.identities_per_batch=16" in said


def test_shards_are_checked(world: list[str], tmp_path: Path) -> None:
    folder = next(s for s in world if s.startswith("data.shards=")).split("=")[1]
    shutil.copytree(folder, tmp_path / "shards")
    here = [*world, f"data.shards={tmp_path / 'shards'}"]
    assert "every sample is whole" in ppreid("shards", "--check", *here).stdout
    tar = tmp_path / "shards" / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 0xFF
    tar.write_bytes(data)
    assert "train-000000.tar" in ppreid("shards", "--check", *here, expect=1).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["shards", "--config", "a.yaml", "--config", "b.yaml"], "--config: given twice"),
        (["train", "optimiser.lrr=1"], "optimiser.lrr:"),
        (["train", "configs/demo.yaml"], "configs/demo.yaml: an override has the form key=value; a file? give it by"),
        (["shards", "data.kind=market1501", "data.root=/nowhere"], "/nowhere: no such folder (data.root)"),
        (["shards", "--check", "data.shards=/nowhere"], "/nowhere: no such folder (data.shards); write it by"),
        (["report", "/nowhere"], "/nowhere/attack.json: no such file"),
        (["evaluate", "/nowhere"], "/nowhere: not a run"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    done = ppreid(*arguments, expect=2)
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "does", "given"),
    [
        (["--address", "head:1", "--nodes", "3", "--resume"], "sweep_on_ray",
         {"address": "head:1", "nodes": 3, "resume": True, "retry": False, "reattack": False}),
        (["--backend", "array", "--task", "1", "--tasks", "4", "--retry"], "sweep_in_array",
         {"1": 1, "2": 4, "resume": False, "retry": True, "reattack": False}),
        (["--backend", "array", "--reattack"], "sweep_in_array", {"1": 0, "2": 1, "reattack": True}),
        (["--front"], "write_again", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("command", "file"), [("sweep", "sweep_demo"), ("bench-privacy", "privacy_bench_small")])
def test_a_sweep_s_words_reach_what_does_it(
    monkeypatch: pytest.MonkeyPatch, command: str, file: str, words: list[str], does: str, given: dict[str, Any]
) -> None:
    """The command stops where the sweep begins, which tests/test_sweep.py is about."""
    heard: dict[str, Any] = {}

    def stand_in(name: str) -> Callable[..., Any]:
        def called(*arguments: Any, **how: Any) -> dict[str, Any]:
            heard.update({"name": name} | {str(place): value for place, value in enumerate(arguments)} | how)
            trials = [{"status": "failed"}, {"status": "done"}]
            return {"trials": trials, "expected": 2, "recommended": None, "complete": True}

        return called

    for name in ("sweep_on_ray", "sweep_in_array", "write_again"):
        monkeypatch.setattr(f"ppreid_dist.sweep.driver.{name}", stand_in(name))
    done = ppreid(command, "--config", f"configs/{file}.yaml", *words)
    assert "2 of 2 trials, 1 failed; recommended: none" in done.stdout
    assert heard["name"] == does and heard["0"].output == f"runs/{file}"
    assert {key: heard[key] for key in given} == given


def test_a_sweep_of_failures_alone_fails_and_methods_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    front = {"trials": [{"status": "failed"}], "expected": 1, "recommended": None, "complete": True}
    monkeypatch.setattr("ppreid_dist.sweep.driver.write_again", lambda config: front)
    ppreid("sweep", "--config", "configs/sweep_demo.yaml", "--front", expect=1)
    said = ppreid("bench-privacy", "--config", "configs/sweep_demo.yaml", "--front", expect=2).stderr
    assert said.startswith("error: methods: name the methods to compare")


def test_kills_removes_nothing_and_says_a_mistake_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "prepare_shards", lambda *_, **__: pytest.fail("went on"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").touch()
    for out, words, message in (
        ("runs", [], f"error: --out: {tmp_path / 'runs'} isn't empty; name a new folder, or remove it"),
        ("new: 1", ["data.heigth=3"], "error: data.heigth: Key 'heigth' not in 'DataConfig'"),
    ):
        monkeypatch.setattr(sys, "argv", ["kills.py", "--out", str(tmp_path / out), *words])
        with pytest.raises(SystemExit) as ended:
            kills.main()
        assert str(ended.value.code).startswith(message) and "\n" not in str(ended.value.code)
    assert [file.name for file in tmp_path.rglob("*")] == ["runs", "mine"]


# --- the documents ----------------------------------------------------------------------------------------------

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def printed_commands() -> list[str]:
    """The commands of all documents but the log, which tells of older versions."""
    texts = [file.read_text(encoding="utf-8") for file in DOCUMENTS if file.name != "LOG.md"]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [re.split(r"\s+#", line)[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return sorted(set(commands))


def test_the_configurations_in_the_documents_exist() -> None:
    words = [word for command in printed_commands() for word in shlex.split(command)]
    named = [word for word in words if word.startswith("configs/")]
    assert len(named) > 20
    assert not [word for word in named if not (ROOT / word).is_file()]


@pytest.mark.parametrize("command", [c for c in printed_commands() if c.startswith(("ppreid", "accelerate"))])
def test_the_words_in_the_documents_are_understood(command: str) -> None:
    """Flags and settings as printed parse: settings by the real loader, flags by --help."""
    from ppreid_dist.experiment import Config
    from ppreid_dist.settings import load_settings
    from ppreid_dist.sweep.config import SweepConfig

    words = shlex.split(command)
    settings = [word for word in words if re.fullmatch(r"[a-z_.]+=.*", word)]
    config = words[words.index("--config") + 1] if "--config" in words else None
    schema = SweepConfig if words[1] in ("sweep", "bench-privacy") else Config
    load_settings(schema, ROOT / config if config else None, settings)
    program = ["ppreid", words[1]] if words[0] == "ppreid" else ["train.py"]
    helped = ppreid(*(program[1:] or ["train"]), "--help").stdout
    ours = words[words.index("train.py") :] if "train.py" in words else words
    for flag in (word for word in ours if word.startswith("--")):
        assert flag in helped, f"{command}: {flag}"

"""Settings: YAML, overrides, bounds; every mistake is one line that starts with the key or the file."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ppreid_dist.errors import ConfigError
from ppreid_dist.experiment import Config, flat
from ppreid_dist.settings import Settings, describe, help_text, load_settings, option, save_settings, to_dict
from ppreid_dist.sweep.config import SweepConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class Inner(Settings):
    rate: float = option(0.1, "a rate", more_than=0, at_most=1)
    kind: str = option("a", "a kind", choices=("a", "b"))
    note: str | None = option("", "a text, or nothing")


@dataclass(kw_only=True)
class Outer(Settings):
    inner: Inner = option(Inner(), "")
    many: list[Inner] = option([Inner()], "several")
    size: tuple[int, int] = option((4, 2), "a size")
    count: int = option(3, "a count", at_least=1)
    maybe: float | None = option(None, "or nothing")
    decay: float = option(0.9, "a decay", at_least=0, less_than=1)


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("countt=3", "countt:"),
        ("inner.rat=3", "inner.rat:"),
        ("count=three", "count:"),
        ("count=0", "count:"),
        ("inner.rate=0", "inner.rate:"),
        ("inner.rate=2", "inner.rate:"),
        ("decay=1", "decay: 1.0 must be less than 1"),
        ("inner.kind=c", "inner.kind:"),
        ("many=[{kind: c}]", "many[0].kind:"),
        ("many=[{kin: a}]", "kin:"),
        ("many=[]", "many: at least one must be given"),
        ("count", "count:"),
        ("count" * 99, "countcount"),
        ("size=[1,x]", "size"),
        ("inner.rate=nan", "inner.rate: nan is not a finite number"),
        ("maybe=.inf", "maybe: inf is not a finite number"),
        ("many[0].kind=b", "many[0].kind: a list is given whole, many=[…]"),
        ("many.0.kind=b", "many.0.kind: a list is given whole"),
        ("inner.kind=${nope}", "inner.kind: Interpolation key 'nope' not found"),
        ("inner.kind=${", "inner.kind:"),
        ("inner.kind=a #b", "inner.kind: what follows ' #' would be a comment"),
        ("inner.kind=[a]", "inner.kind:"),
        ("inner.kind=", "inner.kind:"),
        ("inner.note=a\udcff", "inner.note: 'a\\udcff' is not UTF-8"),
        ("inner={null: 2}", "inner: Incompatible key type 'NoneType'"),
    ],
)
def test_a_mistake_is_one_line_that_starts_with_the_key(override: str, start: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(Outer, None, [override])
    assert str(error.value).startswith(start)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["optimiser.beta1", "reversal.critic_optimiser.beta2", "training.ema", "reversal.lazy.ema_decay"],
)
def test_what_would_never_move_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: 1\.0 must be less than 1$"):
        load_settings(Config, None, [f"{key}=1"])


def test_a_seed_that_torch_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^seed: 18446744073709551616 must be at most 9223372036854775807$"):
        load_settings(Config, None, [f"seed={2**64}"])


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words", "\x00", "null: 2", "inner: {null: 2}"])
def test_a_file_that_is_no_settings_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml") as error:
        load_settings(Outer, file)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such"):
        load_settings(Outer, tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["2026_01_01", "0123", "1e3", "on", "12:30:00", "2026-01-01", ".inf", "0x10", "a: b"])
def test_a_text_is_what_the_command_line_says(text: str) -> None:
    """YAML sees numbers, truth values and times in it."""
    given = f"'{text}'" if ":" in text and " " in text else text
    found = load_settings(Outer, None, [f"inner.note= {given} "])
    assert found.inner.note == text
    assert load_settings(Outer, None, ["inner.note=null"]).inner.note is None
    assert load_settings(Config, None, ["engine.precision=no"]).engine.precision == "no"


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("count: 5\ninner: {rate: 0.5}\n")
    got = load_settings(Outer, tmp_path / "c.yaml", ["inner.rate=0.25", "maybe=1", "size=[8,4]"])
    assert (got.count, got.inner.rate, got.inner.kind, got.maybe, got.size) == (5, 0.25, "a", 1.0, (8, 4))


@given(
    rate=st.floats(0.001, 1),
    count=st.integers(1, 10**9),
    kind=st.sampled_from("ab"),
    maybe=st.none() | st.floats(-9, 9),
)
def test_what_is_saved_is_read_again(tmp_path_factory, rate, count, kind, maybe) -> None:  # type: ignore[no-untyped-def]
    settings = Outer(inner=Inner(rate=rate, kind=kind), count=count, maybe=maybe, many=[Inner(rate=rate), Inner()])
    file = tmp_path_factory.mktemp("s") / "saved.yaml"
    save_settings(settings, file)
    assert load_settings(Outer, file) == settings


def test_defaults_are_not_shared_between_instances() -> None:
    first, second = Outer(), Outer()
    first.many.append(Inner())
    first.inner.rate = 0.9
    assert len(second.many) == 1 and second.inner.rate == 0.1
    deep = Config()
    deep.data.stream.damaged += 7
    deep.attack.ridge.widths.append(99.0)
    assert Config().data.stream.damaged == deep.data.stream.damaged - 7
    assert 99.0 not in Config().attack.ridge.widths


@pytest.mark.parametrize("schema", [Config, SweepConfig])
def test_help_names_every_key_with_its_default(schema: type[Settings]) -> None:
    text = help_text(schema)
    for key, default, explanation in describe(schema):
        assert f"{key}={default}" in text
        assert explanation, f"{key} is not explained"


def test_the_defaults_of_the_help_are_those_that_hold() -> None:
    """Also where settings within settings are given others than their own class has."""
    held = dict(flat(to_dict(Config())))
    told = {key: yaml.safe_load(default) for key, default, _ in describe(Config) if "[i]" not in key}
    differ = {key for key, default in told.items() if key in held and default != held[key]}
    assert differ == {"privacy.adversaries"}, differ  # a list of settings: how many
    assert told["attack.recogniser.optimiser.warmup"] == 0.08 and len(told.keys() & held.keys()) > 200
    assert ("privacy.adversaries[i].kind", "gan") in [entry[:2] for entry in describe(Config)]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    schema = SweepConfig if file.name.startswith(("sweep", "privacy_bench")) else Config
    assert to_dict(load_settings(schema, file))["output"]


def test_a_home_folder_is_found_behind_the_equals_sign() -> None:
    """Where no shell looks for it: a folder named ~ would be made."""
    found = load_settings(Config, None, ["output=~/a", "data.root=~/b", "data.shards=~/c"])
    assert [found.output, found.data.root, found.data.shards] == [str(Path.home() / name) for name in "abc"]

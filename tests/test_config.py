"""One schema: every field is read, every mistake is named."""

import ast
import dataclasses
import itertools
import json
import os
import re
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from configs import bytes as byte_level
from configs import smallcoder
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import Config, DecoderConfig, default_config, from_config_dict, to_dict
from smallcoder_jax.config.fields import RANGE, Range
from smallcoder_jax.configfile import config_files, load_config, read_config_file, split_overrides
from smallcoder_jax.main import list_configs

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = config_files(ROOT / "configs")


def fields_of_schema() -> list[tuple[str, str]]:
    found = []
    for section in dataclasses.fields(Config):
        default = getattr(Config(), section.name)
        if dataclasses.is_dataclass(default):
            found += [(section.name, field.name) for field in dataclasses.fields(default)]
        else:
            found.append(("config", section.name))
    return found


def reads_in(source: str) -> set[tuple[str, str]]:
    """(section, field) for every read written as `<section>.<field>`, `<anything>.<section>.<field>`, or through a name
    that was assigned `<anything>.<section>`."""
    reads = set()
    tree = ast.parse(source)
    section_of = {
        node.targets[0].id: node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Attribute)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            reads |= {(name.lstrip("_"), node.attr), (section_of.get(name, ""), node.attr)}
    return reads


def test_every_field_is_read_outside_of_validation() -> None:
    reads: set[tuple[str, str]] = set()
    for path in itertools.chain((ROOT / "smallcoder_jax").rglob("*.py"), (ROOT / "tools").rglob("*.py")):
        if path.parent.name != "config":
            reads |= reads_in(path.read_text())
    # Read through a property or function of the schema itself.
    reads |= {("train", "microbatch_size")} if ("train", "microbatch_rows") in reads else set()
    reads |= (
        {("eval", "batch_size")}
        if "eval_rows(" in (ROOT / "smallcoder_jax/stages/shared/documents.py").read_text()
        else set()
    )
    unread = [field for field in fields_of_schema() if field not in reads]
    assert not unread, f"fields that nothing reads: {unread}"


def test_a_field_that_nothing_reads_would_be_noticed() -> None:
    assert ("train", "steps") in reads_in("x = config.train.steps")
    assert ("train", "steps") in reads_in("settings = config.train\nx = settings.steps")
    assert ("train", "steps") not in reads_in("config.train.steps = 3\nother.steps")


def test_defaults_survive_the_round_trip() -> None:
    config = from_config_dict(default_config())
    assert config == Config()
    assert from_config_dict(to_dict(config)) == config


def test_json_round_trip() -> None:
    import json

    config = from_config_dict(read_config_file(str(ROOT / "configs/nano.py")))
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_are_valid_and_quote_their_true_count(path: Path) -> None:
    config = from_config_dict(read_config_file(str(path)))
    count = f"{config.model.parameter_count():,}"
    assert count in path.read_text(), f"{path.name}: the docstring must quote {count}"
    assert f"--config=configs/{path.name}" in path.read_text()


PUBLISHED = {"tiny": 100_682_496, "small": 195_068_928, "medium": 304_137_216}


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("long", [False, True])
def test_variants_have_the_published_size(variant: str, long: bool) -> None:
    config = load_config(str(ROOT / "configs" / f"{variant}{'_lc' if long else ''}.py"), [])
    assert config.model.parameter_count() == PUBLISHED[variant]
    assert config.model.rope_theta == (500_000.0 if long else 10_000.0)
    if long:
        assert config.model.context == config.train.sequence_length == 8192


GPT2 = DecoderConfig(
    vocab_size=50257, width=768, mlp_width=3072, layers=12, heads=12, kv_heads=12, head_size=64, context=1024,
    norm="layernorm", positions="learned", mlp="gelu", bias="all",
)  # fmt: skip
STAGED_TINY = DecoderConfig(
    vocab_size=32000, width=256, mlp_width=1024, layers=4, heads=4, kv_heads=4, head_size=64, context=512,
    mlp="gelu", bias="all",
)  # fmt: skip


@pytest.mark.parametrize(("shape", "count"), [(GPT2, 124_439_808), (STAGED_TINY, 11_349_248)])
def test_other_families_are_the_same_decoder(shape: DecoderConfig, count: int) -> None:
    assert shape.parameter_count() == count


SIZES = ("vocab_size", "width", "mlp_width", "layers", "heads", "kv_heads", "head_size", "context")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.stepz=3", "did you mean 'steps'"),
        ("--config.trian.steps=3", "did you mean 'train'"),
        ("--config.train.steps=many", "expected int"),
        ("--config.train.steps=1.5", "expected int"),
        ("--config.train=3", "a section with"),
        ("--config.train.steps.x=3", "a value, not a section"),
        ("--config.optimizer.name=adamv", "expected one of 'adamw', 'muon'"),
        ("--config.model.kv_heads=2", "multiple of"),
        ("--config.train.sequence_length=9999", "model.context"),
        ("--config.train.batch_size=0", "train.batch_size=0 must be at least 1"),
        ("--config.log.tensorboard=2", "expected bool"),
        ("--config.train.steps={[]:1}", "expected int"),
        *((f"--config.model.{name}=0", f"model.{name}=0 must be at least 1") for name in SIZES),
        ("--config.model.layers=-1", "model.layers=-1 must be at least 1"),
        ("--config.model.window=-5", "model.window=-5 must be at least 0; 0 means the whole document"),
        ("--config.data.max_documents=-1", "data.max_documents=-1 must be at least 0"),
        ("--config.data.min_tokens=0", "data.min_tokens=0 must be at least 1"),
        ("--config.data.max_unusable=0", "data.max_unusable=0 must be at least 1"),
        ("--config.train.seed=-1", "train.seed=-1 must be at least 0"),
        (f"--config.train.seed={2**32}", "train.seed=4294967296 must be at most 4294967295"),
        ("--config.eval.every=-1", "eval.every=-1 must be at least 0"),
        ("--config.eval.batches=-1", "eval.batches=-1 must be at least 0"),
        ("--config.eval.sample_tokens=-1", "eval.sample_tokens=-1 must be"),
        ("--config.eval.sample_tokens=512", "eval.sample_tokens=512 must be below model.context=512"),
        ("--config.eval.sample_temperature=-0.1", "eval.sample_temperature=-0.1 must be"),
        *(
            (f"--config.log.profile_steps={steps}", "expected FIRST:STOP with 1 <= FIRST < STOP")
            for steps in ("20", "20:", ":3", "3:3", "0:2", "5:2", "a:b", "1:2:3")
        ),
        ("--config.log.profile_steps=2201:2203", "profile_steps='2201:2203' begins after train.steps=2200"),
        ("--config.eval.sample_temperature=1e999", "eval.sample_temperature=inf must be"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(str(ROOT / "configs/nano.py"), [override])


def test_samples_fit_only_where_some_are_drawn() -> None:
    nano = str(ROOT / "configs/nano.py")
    short = ["--config.model.context=8", "--config.train.sequence_length=8"]
    with pytest.raises(UserError, match="sample_tokens=48 must be below"):
        load_config(nano, short)
    for override in ("sample_tokens=0", "sample_tokens=7", "sample_prompts=()"):
        assert load_config(nano, [*short, f"--config.eval.{override}"]).model.context == 8


def test_a_sequence_of_strings_is_insisted_on() -> None:
    for value in (5, "text", ["a", 5], None):
        with pytest.raises(UserError, match="expected a sequence of strings"):
            from_config_dict({"eval": {"sample_prompts": value}})


def test_sections_are_insisted_on() -> None:
    with pytest.raises(UserError, match="got list"):
        from_config_dict(json.loads("[]"))


def numbers_of_schema() -> list[tuple[str, str, type, Range | None]]:
    """(section, field, int or float, range) of every number in the schema."""
    found = []
    for name, section in vars(Config()).items():
        if dataclasses.is_dataclass(section):
            hints = get_type_hints(type(section))
            found += [
                (name, field.name, hints[field.name], field.metadata.get(RANGE))
                for field in dataclasses.fields(section)
                if hints[field.name] in (int, float)
            ]
    return found


NUMBERS = numbers_of_schema()
IDS = [f"{section}.{field}" for section, field, _, _ in NUMBERS]


@pytest.mark.parametrize(("section", "field", "kind", "allowed"), NUMBERS, ids=IDS)
def test_every_number_has_a_range_and_what_is_just_outside_of_it_is_refused(
    section: str, field: str, kind: type, allowed: Range | None
) -> None:
    assert allowed is not None, "give it its range with `number`"

    def refusal(value: float) -> str:
        try:
            from_config_dict({section: {field: value}})
        except UserError as error:
            return str(error)
        return ""

    def beside(value: float, direction: int) -> float:
        return int(value) + direction if kind is int else float(np.nextafter(np.float32(value), direction * np.inf))

    named = f"config: {section}.{field}="
    for end, direction in ((allowed.low, -1), (allowed.high, 1)):
        if np.isfinite(end):
            assert allowed.problem(kind(end)) == ""
            assert refusal(beside(end, direction)).startswith(named)
    for end, direction in ((allowed.above, 1), (allowed.below, -1)):
        if np.isfinite(end):
            assert refusal(kind(end)).startswith(named)
            assert allowed.problem(beside(end, direction)) == ""
    if kind is int:
        assert np.isfinite([allowed.low, allowed.high]).all(), "a whole number has two ends"
    else:
        assert max(allowed.low, allowed.above) > -np.inf, "no number of the config may be any negative one"
        # Of the last, float32 makes an infinity; of 10**400 there is no float at all.
        for value in (np.nan, np.inf, -np.inf, 1e39, 10**400):
            assert f"{section}.{field}" in refusal(value)


def test_a_share_that_float32_rounds_to_one_is_one() -> None:
    with pytest.raises(UserError, match=r"optimizer\.b2=0\.99999999 must be below 1"):
        from_config_dict({"optimizer": {"b2": 0.99999999}})
    with pytest.raises(UserError, match=r"optimizer\.eps=1e-60 must be above 0"):
        from_config_dict({"optimizer": {"eps": 1e-60}})


def test_a_number_that_cannot_be_written_down_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"train\.steps=a value of type int that cannot be shown must be at most 2147483647"
    ):
        from_config_dict({"train": {"steps": 10**5000}})


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError, match=r"config: train\.steps=0 .*\n  and: optimizer\.b1=2\.0 must be below 1"):
        from_config_dict({"train": {"steps": 0}, "optimizer": {"b1": 2.0}})


BEGINNING = "from smallcoder_jax.config import default_config\ndef get_config():\n    config = default_config()\n"
ODD = """from smallcoder_jax.config import default_config
class Odd:
    def __repr__(self): raise ValueError
def get_config():
    config = default_config().unlock()
    with config.ignore_type():
        config.{} = {}
    return config
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BEGINNING, r"get_config\(\) returns NoneType; expected a ConfigDict"),
        (BEGINNING + "    return config.to_dict()", r"get_config\(\) returns dict; expected a ConfigDict"),
        (BEGINNING + "    config.trian.steps = 3", "AttributeError: .*trian"),
        ("def get_config(:", r"SyntaxError: .*config\.py, line 1"),
        ("import no_such_module", "ModuleNotFoundError: .*no_such_module"),
        ("get_config = 3", "TypeError"),
        ("import sys\nsys.exit(0)", r" ends the program, with sys\.exit\(0\)"),
        ("def get_config():\n    raise SystemExit", r" ends the program, with sys\.exit\(None\)"),
        ("class Odd(BaseException): pass\nraise Odd('no')", "Odd: no"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("class Odd(Exception):\n    def __str__(self): 1 / 0\nraise Odd", "Odd: an error that cannot be shown"),
        ("get_config = lambda: get_config()", "RecursionError"),
        ("def get_config():\n    return 5", r"get_config\(\) returns int; expected a ConfigDict"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({1: 2})",
            "unknown config key '1'",
        ),
        (BEGINNING + "    config.train = 3\n    return config", "TypeError|is a section; got 3"),
        (ODD.format("optimizer.name", "Odd()"), "optimizer.name=a value of type Odd that cannot be shown"),
        (ODD.format("optimizer.b1", "10**5000"), "OverflowError"),
        (ODD.format("eval.sample_prompts", "['\\ud800']"), ".*expected text in UTF-8"),
    ],
)
def test_mistakes_in_a_config_file_name_it(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"config file '{path}'(: )?{message}"):
        load_config(str(path), [])


def test_overrides_take_the_type_of_the_key() -> None:
    config = load_config(
        str(ROOT / "configs/nano.py"),
        ["--config.train.steps=1e3", "--config.optimizer.learning_rate=1", "--config.log.tensorboard=false",
         "--config.data.sources=dir:/a=b", "--config.eval.sample_prompts=('x','y')"],
    )  # fmt: skip
    assert (config.train.steps, config.optimizer.learning_rate) == (1000, 1.0)
    assert config.log.tensorboard is False
    assert config.data.sources == "dir:/a=b"
    assert config.eval.sample_prompts == ("x", "y")


def test_missing_config_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean '.*medium_lc\.py'"):
        load_config(str(ROOT / "configs/medum_lc.py"), [])
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(UserError, match="no get_config"):
        load_config(str(empty), [])


@pytest.mark.parametrize(
    ("given", "meant"),
    [("nanno", "nano"), ("SmallCoder-Tiny", "tiny"), ("smallcoder-tiny-lc", "tiny_lc"), ("configs/nanno.py", "nano"),
     ("configs/Small.py", "small"), ("stages/code.py", None), ("configs", None), ("", None), ("x" * 10_000, None),
     ("a\0b", None), ("configs/\udcff.py", None)],
)  # fmt: skip
def test_a_name_is_answered_with_the_file_that_it_means(given: str, meant: str | None) -> None:
    with pytest.raises(UserError) as refused:
        read_config_file(given)
    hint = f"did you mean 'configs/{meant}.py'?" if meant else "--list names those that exist"
    assert hint in str(refused.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_variant_is_a_row_of_the_table(path: Path) -> None:
    """The file has its docstring and one line; the row by itself, and the bare name, give the same config."""
    table = next(table for table in (smallcoder, byte_level) if path.stem in table.VARIANTS)
    tree = ast.parse(path.read_text())
    assert [type(node) for node in tree.body] == [ast.Expr, ast.ImportFrom, ast.Assign]
    same = [load_config(str(path), []), load_config(path.stem, [])]
    assert same == [load_config(f"{table.__file__}:{path.stem}", [])] * 2


def test_a_bare_name_is_a_config_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder; also a stage's, and a user's own `configs/` come first."""
    monkeypatch.chdir(tmp_path)
    assert load_config("medium_lc", []) == load_config(str(ROOT / "configs/medium_lc.py"), [])
    assert load_config("stages/code:nano", []) == load_config(str(ROOT / "configs/stages/code.py:nano"), [])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "medium_lc.py").write_text(BEGINNING + "    config.name = 'mine'\n    return config\n")
    assert load_config("medium_lc", []).name == "mine"
    with pytest.raises(UserError, match="expected one of tiny, tiny_lc"):
        load_config(str(ROOT / "configs/smallcoder.py:huge"), [])
    with pytest.raises(UserError, match=r"'.*tiny\.py' takes no argument; leave ':x' out"):
        load_config("tiny:x", [])


def test_the_projects_configs_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/nano.py", []).name == "smallcoder-nano"
    assert load_config("configs/stages/code.py:nano", []).name == "smallcoder-nano-code"
    assert "configs/tiny.py " in list_configs()
    with pytest.raises(UserError, match=r"did you mean '.*configs/nano\.py'"):
        load_config("nanno", [])
    # What is here is meant first; and a colon may be part of a name.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "nano.py").write_text(BEGINNING + "    config.name = 'mine'\n    return config\n")
    (tmp_path / "a:b.py").write_text((tmp_path / "configs" / "nano.py").read_text())
    assert load_config("configs/nano.py", []).name == load_config("a:b.py", []).name == "mine"


def test_the_config_of_a_run_is_a_config_file(tmp_path: Path) -> None:
    recorded = tmp_path / "config.json"
    config = load_config(str(ROOT / "configs/nano.py"), ["--config.train.steps=7"])
    recorded.write_text(json.dumps(to_dict(config)))
    assert load_config(str(recorded), []) == config
    again = load_config(str(recorded), ["--config.train.steps=9", "--config.eval.sample_prompts=()"])
    assert (again.train.steps, again.eval.sample_prompts, again.model) == (9, (), config.model)
    with pytest.raises(UserError, match="takes no argument"):
        load_config(f"{recorded}:nano", [])
    for text, message in (
        ("[" * 100_000, "nested"),
        ("[]", "holds a list"),
        ('{"train": {"stepz": 1}}', "unknown config key 'train.stepz'; did you mean 'steps'"),
        ('{"train": {"steps": NaN}}', "no JSON number"),
        ('{"train": 3}', "'train' is a section; got 3"),
        ('{"model": {"rope_theta": 1' + "0" * 400 + "}}", "rope_theta: expected a float"),
        ('{"eval": {"sample_prompts": ["\\ud800"]}}', "expected text in UTF-8"),
        ("\x00", "cannot be read"),
        ("\xff", "not UTF-8"),
    ):
        recorded.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=message) as refused:
            load_config(str(recorded), [])
        assert str(recorded) in str(refused.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe, device, huge = tmp_path / "pipe.py", tmp_path / "device.json", tmp_path / "huge.py"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    for path, message in ((pipe, "a pipe, not a file"), (device, "a device"), (huge, "larger than")):
        with pytest.raises(UserError, match=message):
            load_config(str(path), [])


def test_text_that_utf8_cannot_hold_is_refused() -> None:
    for override, message in (
        ("data.sources=dir:/\udcff", "text in UTF-8"),
        ("eval.sample_prompts=('\udcff',)", "tuple"),
    ):
        with pytest.raises(UserError, match=f"expected {message}"):
            load_config(str(ROOT / "configs/nano.py"), [f"--config.{override}"])


def test_unknown_keys_in_a_config_file_are_named() -> None:
    values = to_dict(Config())
    values["data"]["source"] = "stdlib"
    with pytest.raises(UserError, match=r"'data\.source'; did you mean 'sources'"):
        from_config_dict(values)


def test_split_overrides_joins_values() -> None:
    others, overrides = split_overrides(["--config=a.py", "--config.train.steps", "3", "--config.name=x"])
    assert others == ["--config=a.py"]
    assert overrides == ["--config.train.steps=3", "--config.name=x"]
    with pytest.raises(UserError, match="needs a value"):
        split_overrides(["--config.train.steps"])


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay", "steps", "said"),
    [
        ("cosine", 500, 0, 100, "never reached: optimizer.warmup_steps=500 is more than train.steps=100, .* 20% of it"),
        ("cosine", 100, 0, 100, ""),
        ("wsd", 30, 80, 100, "warm-up reaches into the decay"),
        ("wsd", 20, 80, 100, ""),
    ],
)
def test_a_schedule_that_never_reaches_its_peak_is_said(
    schedule: str, warmup: int, decay: int, steps: int, said: str
) -> None:
    values = {"schedule": schedule, "warmup_steps": warmup, "decay_steps": decay}
    config = from_config_dict({"train": {"steps": steps}, "optimizer": values})
    found = config.optimizer.schedule_fault(steps)
    assert re.search(said, found) if said else found == ""


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("learning_rate=1", "'optimizer.learning_rate'"),
        ("steps=3", "'train.steps'"),
        ("batchsize=1", "'eval.batch_size'"),
    ],
)
def test_a_key_without_its_section_is_answered_with_it(override: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {meant}"):
        load_config(str(ROOT / "configs/nano.py"), [f"--config.{override}"])

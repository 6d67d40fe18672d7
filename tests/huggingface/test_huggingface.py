"""The folder: same bytes again, strict reading, and errors that name what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import smallcoder_jax
from smallcoder_jax.base.display import printable
from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import DecoderConfig
from smallcoder_jax.huggingface import card as model_card
from smallcoder_jax.huggingface import record, write
from smallcoder_jax.huggingface.read import read_export
from smallcoder_jax.models import build
from smallcoder_jax.models.decoder.published import PUBLISHED
from smallcoder_jax.tokenizers import base
from smallcoder_jax.tokenizers.base import Tokenizer
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from smallcoder_jax.tokenizers.load import load_tokenizer
from tests.helpers import FLOAT32
from tests.huggingface.conftest import MODELS, gpt2, llama, random_params
from tests.huggingface.test_tokenizer import published

CARD = {
    "name": "pipe | and `tick`",
    "training": {"steps": 12_345, "z": 1, "a": 0.5},
    "evaluation": {"bits per byte": 1.23456789},
    "data": {
        "dummy": True,
        "fingerprint": "abc",
        "sources": [{"spec": "dir:a|b", "weight": 1.0, "documents": 3, "tokens": None, "bytes": 7}],
        "licenses": {"mit": 5, "apache-2.0": 2},
    },
    "parity": {"checked": True, "tolerance": 1e-4, "lengths": [1, 7], "texts": 3, "greedy_tokens": 64},
}
FILES = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "tokenizer_kind.json", "chat_template.jinja", "README.md", "export.json",
}  # fmt: skip


def export(folder: Path, model: DecoderConfig, tokenizer: Tokenizer, **options: Any) -> Any:
    params = options.pop("params", None) or random_params(model)
    given: dict[str, Any] = {"card": CARD, **options}
    write.write_export(folder, model=model, params=params, tokenizer=tokenizer, **given)
    return params


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_import_export_gives_the_same_bytes(name: str, dtype: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    params = export(tmp_path / "one", MODELS[name], tokenizer, dtype=dtype)
    read, written = read_export(tmp_path / "one"), record.read(tmp_path / "one")
    assert dataclasses.replace(read.model, dropout=0.0) == dataclasses.replace(MODELS[name], dropout=0.0)
    assert jax.tree.structure(read.params) == jax.tree.structure(params)
    for mine, stored in zip(jax.tree.leaves(params), jax.tree.leaves(read.params), strict=True):
        assert stored.dtype == np.float32
        np.testing.assert_allclose(stored, mine, rtol=0 if dtype == "float32" else 2**-8, atol=0)
    again = load_tokenizer(read.tokenizer_folder)
    export(
        tmp_path / "two", read.model, again, params=read.params, card=written.card, dtype=written.dtype,
    )  # fmt: skip
    assert set(contents(tmp_path / "one")) == FILES
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_export_replaces_an_export_and_nothing_else(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", llama(), tokenizer)
    export(tmp_path / "out", gpt2(), tokenizer)
    assert read_export(tmp_path / "out").model == gpt2()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is no exported model, so it is not replaced"):
        export(tmp_path / "notes", llama(), tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "notes"}


def test_a_run_is_not_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "run.json", "checkpoints/best"):
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(UserError, match="is no exported model, so it is not replaced"):
        export(tmp_path / "run", llama(), tokenizer)
    assert (tmp_path / "run" / "checkpoints" / "best").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_output_that_cannot_be_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match="is no exported model, so it is not replaced"):
        export(tmp_path / "file", llama(), tokenizer)
    with pytest.raises(UserError, match="cannot be written"):
        export(tmp_path / "file" / "out", llama(), tokenizer)
    assert (tmp_path / "file").read_text() == "keep"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="is no exported model, so it is not replaced"):
        export(tmp_path / "loop", llama(), tokenizer)
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        export(tmp_path / ("a" * 300), llama(), tokenizer)


def test_output_without_a_name_of_its_own(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(Path(), llama(), tokenizer)
    assert set(contents(tmp_path / "here")) == FILES


def test_a_link_to_an_export_stays_a_link(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", llama(), tokenizer)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    export(tmp_path / "link", gpt2(), tokenizer)
    assert read_export(tmp_path / "out").model == gpt2()
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}


def test_a_card_shows_what_is_hidden() -> None:
    odd = "\x1b[2J\u202e`|\n"
    data = {
        "dummy": False,
        "fingerprint": odd,
        "sources": [{"spec": odd, "weight": 1.0, "documents": 1, "tokens": None, "bytes": None}],
        "licenses": {odd: 3},
    }
    given = {"name": odd, "training": {odd: odd}, "evaluation": {odd: odd}, "data": data}
    text = model_card.render(llama(), given, dtype="float32", fim=[odd, odd, odd], chat=True)
    assert text == printable(text)
    assert text.count("x1b") == 11
    assert text.count("u202e") == 11


def test_card(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", llama(), tokenizer)
    text = (tmp_path / "out" / "README.md").read_text()
    assert r"# pipe \| and \`tick\`" in text
    assert "| steps | 12,345 |" in text
    assert r"| dir:a\|b | 1 | 3 | not known | 7 |" in text
    assert text.index("| mit | 5 |") < text.index("| apache-2.0 | 2 |")
    assert "generated stand-in text" in text
    assert "`<|fim_prefix|>` + before + `<|fim_suffix|>` + after + `<|fim_middle|>`" in text
    assert "same greedy continuations of 64 tokens" in text
    export(tmp_path / "bare", llama(), tokenizer, card={"name": "bare"})
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "Parity: not checked." in bare
    assert "The licences of the documents are not recorded." in bare
    assert "stand-in" not in bare


@pytest.mark.parametrize("kind", ["own", "published"])
def test_an_export_names_no_folder_of_this_machine(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tokenizer if kind == "own" else published()).save(tmp_path / "jane" / "tokenizer")
    spec = "dir:/home/jane/acme code"
    card = {
        **CARD,
        "training": {
            "stages": f"x-language: 5 steps on prose,{spec}@2; x-code: 7 steps on jsonl:~/secret/a.jsonl?column=b"
        },
        "data": {**CARD["data"], "sources": [{**CARD["data"]["sources"][0], "spec": spec}]},
    }
    given = load_tokenizer(tmp_path / "jane" / "tokenizer")
    export(tmp_path / "jane" / "out", llama(), given, card=card, check=lambda folder: {"checked": True})
    for name, content in contents(tmp_path / "jane" / "out").items():
        for path in (b"jane", b"secret", str(tmp_path).encode()):
            assert path not in content, (name, path)
    text = (tmp_path / "jane" / "out" / "README.md").read_text()
    assert "| dir:acme code | 1 |" in text
    assert "x-code: 7 steps on jsonl:a.jsonl?column=b |" in text


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("dir:/home/jane/code/", "dir:code/"),
        ("dir:~jane/code?x=a/b", "dir:code?x=a/b"),
        ("dir:../x/y,dir:./z@2", "dir:y,dir:z@2"),
        ('dir:"/home/j/a b/c"', 'dir:"c"'),
        ("/home/jane/alpaca.json", "alpaca.json"),
        ("preferences of dir:/a//b", "preferences of dir:b"),
        ("hf:bigcode/the-stack-smol?config=data/x", "hf:bigcode/the-stack-smol?config=data/x"),
        ("dir:.", "dir:."),
        ("https://x.y/z, 3 tokens/s, a / b", "https://x.y/z, 3 tokens/s, a / b"),
    ],
)
def test_paths_in_a_card(text: str, published: str) -> None:
    assert model_card.without_folders({"a": [text, 1, None]}) == {"a": [published, 1, None]}


def test_generation_stops_at_the_end_of_a_turn_and_of_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", llama(), tokenizer)
    content = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert content["eos_token_id"] == [tokenizer.eos_id, *(tokenizer.specials[p] for p in (base.IM_END, base.FILE_SEP))]
    assert "suppress_tokens" not in content
    assert content["pad_token_id"] == tokenizer.pad_id != tokenizer.eos_id


def test_rows_that_no_text_has_are_never_produced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", llama(vocab_size=424), tokenizer)
    content = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert content["suppress_tokens"] == [420, 421, 422, 423]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 424
    loaded = smallcoder_jax.load(tmp_path / "out")
    assert (loaded.model.vocab_size, loaded.tokenizer.vocab_size) == (424, 420)


def test_both_names_of_the_type_are_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tmp_path / "out", llama(), tokenizer, dtype="bfloat16")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mlp": "gelu", "bias": "all"}, r"llama needs model.mlp='swiglu' \(it is 'gelu'\); gpt2 needs model.norm="),
        ({"window": 8}, r"model.window=8: neither"),
        ({"heads": 6}, r"model.width=64 is no multiple of model.heads=6"),
        ({"positions": "learned"}, r"llama needs model.positions='rope' \(it is 'learned'\)"),
    ],
)
def test_what_transformers_cannot_express(
    changes: dict[str, Any], complaint: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        export(tmp_path / "out", llama(**changes), tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"kv_heads": 2}, r"model.kv_heads=2: GPT-2"), ({"head_size": 32}, r"model.head_size=32: GPT-2's heads")],
)
def test_what_gpt2_cannot_express(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        PUBLISHED.model_type(gpt2(**changes))


def test_parameters_of_another_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    params = random_params(llama())
    with pytest.raises(UserError, match=r"parameters lack blocks/2/attention/key/kernel, .* and \d+ more"):
        export(tmp_path / "out", llama(layers=3), tokenizer, params=params)
    with pytest.raises(UserError, match=r"parameters hold blocks/1/"):
        export(tmp_path / "out", llama(layers=1), tokenizer, params=params)
    with pytest.raises(UserError, match=r"parameter embed/embedding has shape \(420, 64\); expected \(421, 64\)"):
        export(tmp_path / "out", llama(vocab_size=421), tokenizer, params=params)
    with pytest.raises(UserError, match=r"the tokenizer has 420 ids, but model.vocab_size=256"):
        export(tmp_path / "out", llama(vocab_size=256), tokenizer)
    with pytest.raises(UserError, match="export dtype 'int8'"):
        export(tmp_path / "out", llama(), tokenizer, params=params, dtype="int8")


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_export_left_is_removed_by_the_next(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ended, here = gone(), os.getpid()
    left = [f".out.partial-{ended}", f".out.partial-{here}", f".out.old-{ended}"]
    other = [f".out.partial-{os.getppid()}", f".out2.partial-{ended}", ".out.partial-x", ".out.partial-1.old"]
    for name in [*left, *other]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("a part")
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", llama(), tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *other}


def test_an_export_that_was_moved_away_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Killed between the two renames, and the next export is refused."""
    export(tmp_path / "out", llama(), tokenizer)
    (tmp_path / "out").rename(tmp_path / f".out.old-{gone()}")
    with pytest.raises(UserError, match="cannot be exported"):
        export(tmp_path / "out", llama(positions="learned"), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_export(tmp_path / "out").model == llama()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(folder, llama(vocab_size=256), ByteTokenizer())
    return folder


def with_config(exported: Path, folder: Path, remove: tuple[str, ...] = (), **values: Any) -> Path:
    """A copy as somebody else would have published it, without our record, with other settings."""
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / record.RECORD).unlink()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**{key: value for key, value in content.items() if key not in remove}, **values})
    )
    return folder


@pytest.mark.parametrize(
    ("remove", "values", "theta"),
    [
        (("rope_theta",), {}, 123_456.0),
        (("rope_parameters",), {}, 123_456.0),
        (("rope_parameters",), {"rope_scaling": None, "rope_theta": 500_000}, 500_000.0),
        (("rope_parameters", "rope_theta"), {"rope_scaling": {"type": "default"}}, 10_000.0),
    ],
)
def test_rotation_in_old_and_new_spelling(
    remove: tuple[str, ...], values: dict[str, Any], theta: float, exported: Path, tmp_path: Path
) -> None:
    assert read_export(with_config(exported, tmp_path, remove, **values)).model.rope_theta == theta


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 123_456.0}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"rope_parameters": LINEAR}, "rope_parameters is .*linear.*; supported: rope_type 'default'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is .*dynamic"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 10_000.0}, "gives two values of rope_theta, 10000.0 and 123456.0"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported: gpt2, llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"mlp_bias": True}, "attention_bias is False and mlp_bias is not"),
        ({"attention_bias": True, "mlp_bias": True}, r"lacks model\.layers\.0\.mlp\.down_proj\.bias"),
        ({"num_hidden_layers": 1}, r"holds model\.layers\.1\..* which no llama of its config.json has"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; expected a value of type int"),
        ({"vocab_size": None}, "vocab_size is None; expected a value of type int"),
        ({"hidden_size": 0}, "hidden_size is 0; expected at least 1"),
        ({"num_key_value_heads": 3}, "config.json: .*model.kv_heads=3"),
        ({"head_dim": 16}, r"self_attn.q_proj.weight has shape \(128, 64\); expected \(64, 64\)"),
        ({"tie_word_embeddings": False}, r"lacks lm_head\.weight"),
    ],
)
def test_config_that_does_not_fit(values: dict[str, Any], complaint: str, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        read_export(with_config(exported, tmp_path, **values))


def test_gpt2_config_that_does_not_fit(tmp_path: Path) -> None:
    export(tmp_path / "gpt2", gpt2(vocab_size=256), ByteTokenizer())
    (tmp_path / "one").mkdir()
    with pytest.raises(UserError, match="scale_attn_weights is False; supported: True"):
        read_export(with_config(tmp_path / "gpt2", tmp_path / "one", scale_attn_weights=False))
    with pytest.raises(UserError, match="activation_function is 'relu'"):
        read_export(with_config(tmp_path / "gpt2", tmp_path / "one", activation_function="relu"))
    with pytest.raises(UserError, match="GPT-2's heads fill its width"):
        read_export(with_config(tmp_path / "gpt2", tmp_path / "one", n_head=6))


def change_tensors(folder: Path, change: Any) -> Path:
    """Also without our record, which knows the weights."""
    (folder / record.RECORD).unlink(missing_ok=True)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop(NORM), r"lacks model\.norm\.weight"),
        (
            lambda tensors: tensors.update(extra=np.ones(3, np.float32)),
            r"model\.safetensors holds extra, which no llama",
        ),
        (
            lambda tensors: tensors.update({NORM: np.ones((1, 64), np.float32)}),
            r"norm.weight has shape \(1, 64\); expected \(64,\)",
        ),
        (lambda tensors: tensors.update({NORM: np.ones(64, np.int8)}), "norm.weight is I8; supported: F32, BF16, F16"),
    ],
)
def test_weights_that_do_not_fit(change: Any, complaint: str, exported: Path, tmp_path: Path) -> None:
    folder = change_tensors(with_config(exported, tmp_path), change)
    with pytest.raises(UserError, match=complaint):
        read_export(folder)


def test_missing_and_damaged_files(exported: Path, tmp_path: Path) -> None:
    folder = with_config(exported, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    with pytest.raises(UserError, match="safetensors is damaged"):
        read_export(folder)
    weights.rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(
        UserError, match=r"model-00001-of-00002\.safetensors is there, but no model\.safetensors\.index\.json"
    ):
        read_export(folder)
    (folder / "pytest_marker.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="a pickle can run any code and is never opened"):
        read_export(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json holds a list, not a JSON object"):
        read_export(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_export(folder)
    with pytest.raises(UserError, match="does not exist; expected an exported model's folder"):
        read_export(tmp_path / "nowhere")
    (folder / "export.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="has format 9; this version reads format 1"):
        record.read(folder)
    (folder / "export.json").unlink()
    with pytest.raises(UserError, match=r"has no export\.json: it was not written by tools\.export"):
        record.read(folder)


def test_a_folder_of_transformers_is_read(tmp_path: Path) -> None:
    """Written by transformers itself, with grouped heads and no head_dim of ours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16, rope_parameters={"rope_type": "default",
            "rope_theta": 777.0},
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    model, params, _ = read_export(tmp_path)
    assert (model.head_size, model.rope_theta, model.embeddings, model.context) == (8, 777.0, "untied", 16)
    query = params["blocks"][0]["attention"]["query"]["kernel"]
    weight = theirs.model.layers[0].self_attn.q_proj.weight.detach().to(torch.float32).numpy()
    np.testing.assert_array_equal(query, weight.T)


def strip_prefix(tensors: dict[str, np.ndarray], keep: str = "") -> None:
    for name in [name for name in tensors if name.startswith("transformer.") and name != keep]:
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def add_masks(tensors: dict[str, np.ndarray], prefix: str = "") -> None:
    for i in range(2):
        tensors[f"{prefix}h.{i}.attn.bias"] = np.ones((1, 1, 4, 4), np.uint8)
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)


def test_published_gpt2_is_read(tmp_path: Path) -> None:
    """OpenAI's file has no prefix, and old files hold the causal masks and the head that is the table."""
    model = gpt2(vocab_size=256)
    params = export(tmp_path / "out", model, ByteTokenizer())
    change_tensors(tmp_path / "out", lambda tensors: add_masks(tensors, "transformer."))
    change_tensors(
        tmp_path / "out", lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].copy()})
    )
    for change in (lambda tensors: None, strip_prefix):
        read = read_export(change_tensors(tmp_path / "out", change)).params
        assert jax.tree.structure(read) == jax.tree.structure(params)
        for mine, stored in zip(jax.tree.leaves(params), jax.tree.leaves(read), strict=True):
            np.testing.assert_array_equal(stored, mine)


def test_published_gpt2_that_does_not_fit(tmp_path: Path) -> None:
    export(tmp_path / "out", gpt2(vocab_size=256), ByteTokenizer())
    change_tensors(tmp_path / "out", strip_prefix)
    twice = {"transformer.ln_f.weight": np.ones(64, np.float32)}
    with pytest.raises(UserError, match=r"holds ln_f\.weight, which"):
        read_export(change_tensors(tmp_path / "out", lambda tensors: tensors.update(twice)))


def test_published_folder_is_loaded(tmp_path: Path) -> None:
    """Without any file of this package, and with the tokenizer in either published form."""
    folder = tmp_path / "gpt2"
    tokenizer = published()
    export(folder, gpt2(vocab_size=tokenizer.vocab_size), tokenizer)
    for name in ("tokenizer_kind.json", "export.json", "README.md"):
        (folder / name).unlink()
    assert smallcoder_jax.load(folder).tokenizer.encode("abba é") == tokenizer.encode("abba é")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="is no tokenizer's folder"):
        smallcoder_jax.load(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    assert smallcoder_jax.load(folder).tokenizer.encode("abba é") == tokenizer.encode("abba é")


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_exactly_one_place(name: str) -> None:
    model = MODELS[name]
    held = [path for tensor in PUBLISHED.tensors(model) for path in tensor.ours]
    _, abstract = build.abstract_model(model, FLOAT32)
    shapes = {
        tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    assert PUBLISHED.shapes(model) == shapes
    assert sorted(map(str, held)) == sorted(map(str, shapes))

"""Writes a Hugging Face folder.

    config.json  generation_config.json  model.safetensors
    tokenizer.json  tokenizer_config.json  chat_template.jinja     as transformers reads them
    tokenizer_kind.json  tokenizer.model                           as this package reads them
    README.md    the model card
    export.json  what the card is made from, and checksums
    *.py         the code of a family that transformers does not have

The same input gives the same bytes. Nothing is pickled.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.base.files import reason, write_json
from smallcoder_jax.config import ModelConfig
from smallcoder_jax.huggingface import card as model_card
from smallcoder_jax.huggingface import names, packed, record, weights
from smallcoder_jax.huggingface import tokenizer as export_tokenizer
from smallcoder_jax.huggingface.read import CONFIG, PACKED
from smallcoder_jax.huggingface.record import CARD, GENERATION_CONFIG, RECORD, Dtype, Weights
from smallcoder_jax.models import build
from smallcoder_jax.models.families import published
from smallcoder_jax.tokenizers import base

_NUMPY_DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": jnp.bfloat16}
_FIM_PIECES = (base.FIM_PREFIX, base.FIM_MIDDLE, base.FIM_SUFFIX)
# The project's default sampling options.
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "max_new_tokens": 200}


def write_export(
    folder: Path,
    *,
    model: ModelConfig,
    params: build.Params,
    tokenizer: base.Tokenizer,
    card: Mapping[str, Any],
    dtype: Dtype = "float32",
    packing: Weights = "float",
    check: Callable[[Path], Mapping[str, Any]] | None = None,
) -> None:
    """Writes the folder completely or not at all. An earlier export at `folder` is replaced.

    `params` are unrolled. With `packing="packed"`, ternary kernels are packed (`huggingface.packed`), and everything
    else is stored in `dtype`. `card` is described in `huggingface.card`. `check` is called with the folder before it is
    moved into place: an exception stops the export, and the return value becomes `card["parity"]`. Raises UserError for
    a model that transformers cannot express or that has nothing to pack, for a tokenizer with more ids than the model,
    and for an existing `folder` that is not an export.
    """
    if dtype not in get_args(Dtype):
        raise UserError(f"export dtype {dtype!r}: expected one of {', '.join(get_args(Dtype))}")
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but {model.vocab_size=}; export the model with the "
            "tokenizer that it was trained with"
        )
    if packing == "packed":
        names.check_packable(model)
    folder = Path(os.path.realpath(folder))  # Path.resolve raises on a loop of links
    _tidy(folder)
    if os.path.lexists(folder) and not _may_be_replaced(folder):
        raise UserError(f"{folder} exists and is no exported model, so it is not replaced; name another --output")
    stored = _stored_tensors(model, params, dtype, packing)  # before anything is written
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {reason(error)}; name another --output") from error
    try:
        _write_model(partial, model, tokenizer, stored, dtype, packing)
        content = model_card.without_folders(card)
        if check is not None:
            content["parity"] = dict(check(partial))
        record.write(partial, record.Record(content, dtype, packing))
        fim = [piece for piece in _FIM_PIECES if piece in tokenizer.specials]
        text = model_card.render(
            model,
            content,
            dtype=dtype,
            packed=packing == "packed",
            fim=[] if export_tokenizer.is_published(partial) else fim,
            chat=(partial / export_tokenizer.CHAT_TEMPLATE).is_file(),
        )
        (partial / CARD).write_text(text, encoding="utf-8", newline="\n")
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_model(
    folder: Path,
    model: ModelConfig,
    tokenizer: base.Tokenizer,
    stored: dict[str, np.ndarray],
    dtype: Dtype,
    packing: Weights,
) -> None:
    """Writes everything that `transformers` needs into `folder`."""
    export_tokenizer.write_tokenizer(folder, tokenizer, context=model.context)
    write_json(folder / CONFIG, _published_config(model, tokenizer, dtype, packing))
    write_json(folder / GENERATION_CONFIG, _generation_config(model, tokenizer))
    for path in published(model).code:
        (folder / path.name).write_bytes(path.read_bytes())
    safetensors.numpy.save_file(stored, folder / weights.WEIGHTS, metadata={"format": "pt"})
    (folder / weights.WEIGHTS).chmod(0o644)


def stored_params(model: ModelConfig, params: build.Params, dtype: Dtype, packing: Weights = "float") -> build.Params:
    """The parameters in float32, with the values that they have when they are stored like this."""
    stored = _stored_tensors(model, params, dtype, packing)

    def read(name: str) -> np.ndarray:
        value = stored[name]
        return value if value.dtype == np.uint8 else value.astype(np.float32)

    held = {name: value.shape for name, value in stored.items()}
    return names.from_published(model, Path(weights.WEIGHTS), held, read, packed=packing == "packed")


def _stored_tensors(model: ModelConfig, params: build.Params, dtype: Dtype, packing: Weights) -> dict[str, np.ndarray]:
    """The tensors of the file. Those of packed kernels are exact in every `dtype`."""
    tensors = names.to_published(model, params, packed=packing == "packed")
    exact = {name for name in tensors if name.removesuffix(packed.SUM) + packed.SUM in tensors}
    return {name: value if name in exact else value.astype(_NUMPY_DTYPES[dtype]) for name, value in tensors.items()}


def _published_config(model: ModelConfig, tokenizer: base.Tokenizer, dtype: Dtype, packing: Weights) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 4.56, and in other programs
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "use_cache": True,
        **published(model).settings(model),
        **({PACKED: True} if packing == "packed" else {}),
    }


def _generation_config(model: ModelConfig, tokenizer: base.Tokenizer) -> dict[str, Any]:
    # Without the other end tokens, a chat would continue with the next turn, and a file of a repository with the next
    # file.
    ends, unused = base.end_ids(tokenizer), base.unused_ids(tokenizer, model.vocab_size)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        **({"suppress_tokens": unused} if unused else {}),
        **_SAMPLING,
    }


def _may_be_replaced(folder: Path) -> bool:
    """Whether `folder` is an earlier export or empty. A config.json is no proof, because a run has one too."""
    return folder.is_dir() and ((folder / RECORD).is_file() or not any(folder.iterdir()))


def _replace(new: Path, folder: Path) -> None:
    """Replaces `folder` by `new`. The folder is complete at all times except between two renames."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Cleans up after killed exports to `folder`: removes their files, and moves an export that was set aside back."""
    ours = re.compile(rf"\.{re.escape(folder.name)}\.(partial|old)-([0-9]{{1,9}})")
    found = [(path, match) for path in sorted(folder.parent.glob(".*-*")) if (match := ours.fullmatch(path.name))]
    for path, match in found:
        if _runs(int(match[2])):
            continue
        if match[1] == "old" and not os.path.lexists(folder):
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether another process has this number. In a container, the killed process may have had our own number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True

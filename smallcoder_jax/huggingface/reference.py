"""The exported model as `transformers` loads it, and what that needs."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from smallcoder_jax.base import files
from smallcoder_jax.base.errors import CheckFailed, UserError
from smallcoder_jax.config import ModelConfig
from smallcoder_jax.models.families import published


def check_installed() -> None:
    """Raises UserError when a package that the check needs is not installed. Called before a long training."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"the export is checked at the end, which needs {' and '.join(missing)}: pip install "
            "'smallcoder_jax[parity]'"
        )


def import_transformers() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"the export check needs {error.name}, which is not installed: pip install 'smallcoder_jax[parity]'"
        ) from error
    return torch, transformers


def load(folder: Path, model: ModelConfig, transformers: Any, torch: Any) -> tuple[Any, Any, str]:
    """The model, the tokenizer, and the names of tensors that `transformers` ignored or initialised, as text."""
    told = published(model)
    check_code(folder, model)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": bool(told.code)}
    try:
        with _modules_elsewhere(transformers):
            loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise CheckFailed(f"transformers cannot load {folder}: {error}") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    left = [f"{kind.split('_')[0]}: {', '.join(sorted(map(str, info[kind])))}" for kind in kinds if info[kind]]
    loaded = loaded.eval() if told.decide is None else loaded.eval().double()
    return loaded, tokenizer, "; ".join(left)


def check_code(folder: Path, model: ModelConfig) -> None:
    """Raises CheckFailed unless the code in `folder`, and the code that its settings name, are what this program brings
    for such models. For models that transformers has, nothing in the folder is executed and nothing is compared."""
    told = published(model)
    if not told.code:
        return
    expected: dict[str, Any] = {path.name: files.sha256(path) for path in told.code}
    found: dict[str, Any] = {path.name: files.sha256(path) for path in sorted(folder.glob("*.py"))}
    for name, own in (("config.json", told.settings(model)), ("tokenizer_config.json", {})):
        expected[name] = own.get("auto_map")
        if (folder / name).exists():
            found[name] = files.read_json_object(folder / name, "settings of an export").get("auto_map")
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise CheckFailed(
            f"{folder}: {', '.join(wrong)} is not the code that this program exports, or names other code, so nothing "
            "of it is executed; export the model again"
        )


@contextlib.contextmanager
def _modules_elsewhere(transformers: Any) -> Iterator[None]:
    """Lets `transformers` copy and import the code of a model in a temporary folder, and not in the user's cache, where
    each export would leave a copy."""
    module = transformers.dynamic_module_utils
    package = transformers.utils.TRANSFORMERS_DYNAMIC_MODULE_NAME

    def taken() -> dict[str, Any]:
        names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
        return {name: sys.modules.pop(name) for name in names}

    before, path = taken(), list(sys.path)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(module, "HF_MODULES_CACHE", folder):
        try:
            yield
        finally:
            taken()
            sys.modules.update(before)
            sys.path[:] = path


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Turns off progress bars, and the warning that a text is longer than the context, because it is only tokenized."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""Checks that this Python has the packages that are needed, before anything imports them, so that the user sees one
message instead of a traceback.

Uses the standard library only, because it reports what else is missing.
"""

import importlib.util
import sys

# Modules that training imports; pyproject.toml lists the packages that provide them as `dependencies`.
NEEDED = (
    "jax",
    "flax",
    "optax",
    "orbax",
    "grain",
    "array_record",
    "tensorflow_datasets",
    "importlib_resources",
    "sentencepiece",
    "ml_collections",
    "clu",
    "absl",
    "numpy",
    "safetensors",
    "jaxtyping",
    "matplotlib",
    "jinja2",
)
COMMANDS = ("smallcoder_jax", "tools", "launch")


def check_environment() -> None:
    """Where this Python lacks a package, ends one of this project's commands with one message and exit code 2. Raises
    ImportError with the same message where other code imports smallcoder_jax.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    more = f" and {len(missing) - 3} more packages" if len(missing) > 3 else ""
    message = (
        f"{sys.executable} lacks {', '.join(missing[:3])}{more}; activate the environment (source .venv/bin/activate), "
        "or install: pip install -e . in the checkout"
    )
    words = sys.orig_argv
    if "-m" in words[:-1] and words[words.index("-m") + 1].split(".")[0] in COMMANDS:
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)
    raise ImportError(message)

"""Whether this Python has what the package needs: looked at first, so that the answer is one message.

Standard library only: it says what else is missing.
"""

import importlib.util
import sys

# Imported by training; each comes with the package (`dependencies` of pyproject.toml).
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
    """Ends a command of ours with one message and code 2 where this Python lacks a package; raises ImportError with the
    same message where the package is imported by somebody else.
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

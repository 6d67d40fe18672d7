"""Reads older checkpoints, in which the model's parameters were not a part of their own, but next to head and critic.

    now   {"model": {"embed": ..., "blocks": ...}, "head": ..., "critic": {"model": ..., "head": ...}}
    flat  {"embed": ..., "blocks": ..., "head": ..., "critic": {"embed": ..., "blocks": ..., "head": ...}}

The optimizer's state contains trees of the same structure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from smallcoder_jax.mesh import parameter_name, path_name


def is_flat(names: Iterable[str]) -> bool:
    """Whether these parameter paths come from a flat checkpoint. Adapters alone are the same in both layouts."""
    return not any("model" in name.split("/") for name in names)


def flattened(tree: Any) -> Any:
    """Converts a tree to the flat layout."""
    if isinstance(tree, dict):
        below = {name: flattened(part) for name, part in tree.items() if name != "model"}
        return {**below, **flattened(tree["model"])} if "model" in tree else below
    if isinstance(tree, tuple):
        parts = [flattened(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def unflattened(flat: Any, wanted: Any) -> Any:
    """The leaves of `flat` in the structure of `wanted`. `flat` has the structure of `flattened(wanted)`."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(flat)}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[parameter_name(path)], wanted)

"""Computes in float64 what a function computes in float32, so that two programs can be compared without rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_WIDENED = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
_FAST = {"xla_backend_optimization_level": 0}  # what takes time is compilation
# Primitives that call another traced function and do nothing else, with the parameter that holds it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}
_CALLS |= {"custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every intermediate float32 and bfloat16 array in float64; its results are numpy arrays.

    The function is traced as it is, for the types of its arguments, and each operation of the trace is then applied to
    float64 arrays. What it rounds on purpose, to whole numbers or in a comparison, it still rounds. Constants keep the
    float32 values that they have in it. Not differentiable.
    """

    compiled: dict[Any, Any] = {}  # by the shapes of the arguments

    def computed(*arguments: Any) -> Any:
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(arguments))
        with jax.enable_x64(True):
            leaves = [_wide(leaf) for leaf in jax.tree.leaves(arguments)]
            if shapes not in compiled:
                with jax.enable_x64(False):
                    traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
                evaluate = jax.jit(functools.partial(_evaluate, traced), compiler_options=_FAST)
                compiled[shapes] = evaluate, jax.tree.structure(shape)
            evaluate, structure = compiled[shapes]
            return jax.tree.unflatten(structure, [np.asarray(output) for output in evaluate(leaves)])

    return computed


def _wide(value: Any) -> Any:
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    return array.astype(jnp.float64) if jnp.dtype(array.dtype) in _WIDENED else array


def _evaluate(closed: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a traced function, computed in float64."""
    found: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, map(_wide, closed.consts), strict=True))
    found |= dict(zip(closed.jaxpr.invars, inputs, strict=True))

    def value(variable: Any) -> Any:
        if not isinstance(variable, core.Literal):
            return found[variable]
        aval: Any = variable.aval
        return _wide(np.asarray(variable.val, aval.dtype))

    for equation in closed.jaxpr.eqns:
        outputs = _apply(equation, [value(variable) for variable in equation.invars])
        found |= dict(zip(equation.outvars, outputs, strict=True))
    return [value(variable) for variable in closed.jaxpr.outvars]


def _apply(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        return _evaluate(params[_CALLS[name]], inputs)
    if name == "cond":
        branches = [lambda *given, branch=branch: _evaluate(branch, given) for branch in params["branches"]]
        return jax.lax.switch(inputs[0], branches, *inputs[1:])
    if name == "scan":
        return _scan(params, inputs)
    # The function by which a scatter combines two numbers is traced anew, for float64.
    widened = {key: None if key == "update_jaxpr" else _wide_dtype(given) for key, given in params.items()}
    if name == "scatter-add":
        return [_scatter_add(inputs, params)]
    outputs = equation.primitive.bind(*inputs, **widened)
    return outputs if equation.primitive.multiple_results else [outputs]


def _wide_dtype(given: Any) -> Any:
    is_type = isinstance(given, np.dtype) or (isinstance(given, type) and issubclass(given, np.generic))
    return jnp.dtype(jnp.float64) if is_type and jnp.dtype(given) in _WIDENED else given


def _scatter_add(inputs: list[Any], params: dict[str, Any]) -> Any:
    operand, indices, updates = inputs
    options = {name: params[name] for name in ("indices_are_sorted", "unique_indices", "mode")}
    return jax.lax.scatter_add(operand, indices, updates, params["dimension_numbers"], **options)


def _scan(params: dict[str, Any], inputs: list[Any]) -> list[Any]:
    consts, carried = params["num_consts"], params["num_carry"]

    def step(carry: Any, x: Any) -> tuple[list[Any], list[Any]]:
        outputs = _evaluate(params["jaxpr"], [*inputs[:consts], *carry, *x])
        return outputs[:carried], outputs[carried:]

    start, xs = inputs[consts : consts + carried], inputs[consts + carried :]
    carry, stacked = jax.lax.scan(step, start, xs, length=params["length"], reverse=params["reverse"])
    return [*carry, *stacked]

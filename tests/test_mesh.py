"""Where devices stand in the mesh: slices outermost, the devices of a process together where they share rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import MeshConfig
from smallcoder_jax.mesh import AXES, make_mesh, place_devices
from tests.helpers import tiny_model


@dataclasses.dataclass(frozen=True)
class Device:
    """What placing looks at."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H200"


def cluster(slices: int, processes: int, devices: int) -> list[Device]:
    """`processes` in each slice, with so many `devices` each; the order is not theirs."""
    numbers = [(s, p, d) for d in range(devices) for p in range(processes) for s in range(slices)]
    return [Device((s * processes + p) * devices + d, s * processes + p, s) for s, p, d in numbers]


def crossing(placed: np.ndarray, attribute: str) -> set[str]:
    """The axes along which the attribute of the devices changes."""
    values = np.vectorize(lambda device: getattr(device, attribute))(placed)
    return {name for axis, name in enumerate(AXES) if (np.diff(values, axis=axis) != 0).any()}


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((4, 2, 1, 2), {"data"}), ((2, 8, 1, 1), {"data"}), ((1, 16, 1, 1), {"fsdp"}), ((2, 1, 4, 2), {"data"})],
)
def test_slices_are_joined_by_the_outermost_axis(shape: tuple[int, ...], axes: set[str]) -> None:
    placed = place_devices(dict(zip(AXES, shape, strict=True)), cluster(2, 2, 4))
    assert placed.shape == shape
    assert len({device.id for device in placed.flat}) == 16
    assert crossing(placed, "slice_index") == axes


def test_data_and_then_fsdp_join_more_slices_than_data_has() -> None:
    placed = place_devices(dict(zip(AXES, (2, 4, 1, 2), strict=True)), cluster(4, 1, 4))
    assert crossing(placed, "slice_index") == {"data", "fsdp"}


def test_axes_that_would_make_every_layer_wait_for_the_slow_network_are_refused() -> None:
    with pytest.raises(UserError, match=r"over 2 slices.* make mesh\.data x mesh\.fsdp a multiple of 2"):
        place_devices(dict(zip(AXES, (1, 1, 1, 16), strict=True)), cluster(2, 2, 4))


@pytest.mark.parametrize("shape", [(4, 1, 4, 1), (2, 2, 2, 2), (1, 4, 2, 2)])
def test_a_row_stays_with_one_process(shape: tuple[int, ...]) -> None:
    placed = place_devices(dict(zip(AXES, shape, strict=True)), cluster(1, 4, 4))
    assert "context" not in crossing(placed, "process_index")


@pytest.mark.parametrize(("context", "tensor", "refused"), [(2, 2, False), (2, 4, True), (4, 1, False), (8, 1, True)])
def test_a_row_that_several_processes_would_share_is_refused(context: int, tensor: int, refused: bool) -> None:
    model = tiny_model(vocab_size=128, heads=8, kv_heads=4)
    mesh = MeshConfig(data=-1, context=context, tensor=tensor)
    if refused:
        with pytest.raises(UserError, match=r"divide the 4 devices of a process"):
            make_mesh(mesh, model, 8, cluster(1, 2, 4))
    else:
        assert make_mesh(mesh, model, 8, cluster(1, 2, 4)).shape["context"] == context

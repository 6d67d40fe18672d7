"""What a program sends is counted from its HLO: real steps on eight pretended devices, and lines as compilers write."""

from __future__ import annotations

import dataclasses
import functools

import jax
import pytest

from smallcoder_jax.config import Config, MeshConfig, TrainConfig
from smallcoder_jax.preflight.collectives import Collective, Traffic, traffic
from smallcoder_jax.stages.shared.next_token import make_loss
from smallcoder_jax.train.program import compile_step, make_program
from tests.helpers import FLOAT32, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

MODEL = tiny_model(vocab_size=96, layers=3)
PARAMETERS = 4 * MODEL.parameter_count()  # bytes
ONE_HOST = [0] * 8


def config_of(microbatches: int, layers: str) -> Config:
    train = TrainConfig(steps=10, batch_size=8 * microbatches, microbatch_size=8, sequence_length=32)
    return tiny_config(model=MODEL, train=train, compute=dataclasses.replace(FLOAT32, layers=layers))


@functools.cache
def text_of(mesh: MeshConfig, microbatches: int = 1, layers: str = "unroll") -> str:
    config = dataclasses.replace(config_of(microbatches, layers), mesh=mesh)
    return compile_step(make_program(config, make_loss(config), jax.devices()), config).as_text()


def by_kind(found: Traffic) -> dict[str, Collective]:
    return {each.kind: each for each in found.collectives}


def test_data_parallel_reduces_each_gradient_once() -> None:
    found = traffic(text_of(MeshConfig()), ONE_HOST)
    (reduced,) = found.collectives
    assert reduced.kind == "all-reduce"
    assert PARAMETERS <= reduced.payload < 1.3 * PARAMETERS  # the tied embedding may be reduced twice; and scalars
    assert reduced.sent == pytest.approx(2 * 7 / 8 * reduced.payload)
    assert reduced.between_hosts == 0
    assert found.unknown_loops == 0


@pytest.mark.parametrize("microbatches", [1, 3])
def test_layers_and_microbatches_in_loops_count_every_round(microbatches: int) -> None:
    text = text_of(MeshConfig(), microbatches, "scan")
    assert " while(" in text
    found = traffic(text, ONE_HOST)
    assert found.unknown_loops == 0
    payload = by_kind(found)["all-reduce"].payload
    assert microbatches * PARAMETERS <= payload < 1.3 * microbatches * PARAMETERS


def test_fsdp_gathers_parameters_and_leaves_gradients_split() -> None:
    found = by_kind(traffic(text_of(MeshConfig(data=1, fsdp=8)), ONE_HOST))
    matrices = PARAMETERS - 4 * MODEL.width * (2 * MODEL.layers + 1)
    assert found["all-gather"].payload >= matrices
    assert found["all-gather"].sent == pytest.approx(7 / 8 * found["all-gather"].payload)


def test_tensor_parallel_reduces_activations_in_groups_of_two() -> None:
    reduced = by_kind(traffic(text_of(MeshConfig(data=4, tensor=2)), ONE_HOST))["all-reduce"]
    rows = 8 // 4
    activations = 4 * rows * 32 * MODEL.width
    # Of each layer, attention and MLP, forward and backward, at the least.
    assert reduced.count >= 4 * MODEL.layers
    assert reduced.payload >= 4 * MODEL.layers * activations + PARAMETERS / 2


def test_one_device_sends_nothing() -> None:
    config = config_of(1, "unroll")
    text = compile_step(make_program(config, make_loss(config), jax.devices()[:1]), config).as_text()
    assert traffic(text, [0]) == Traffic((), 0)


MODULE = """HloModule step, num_partitions=8

%condition (p: (s32[], f32[8,4])) -> pred[] {{
  %p = (s32[], f32[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[]{{:T(128)}} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction={direction}
}}

%body (q: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  %q = (s32[], f32[8,4]{{1,0:T(8,128)S(1)}}) parameter(0)
  %x = f32[8,4]{{1,0:T(8,128)}} get-tuple-element(%q), index=1
  {collective}
  ROOT %t = (s32[], f32[8,4]) tuple(%q, %x)
}}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {{
  %a = f32[8,4]{{1,0}} parameter(0)
  %start = (s32[], f32[8,4]) tuple(%a)
  %loop = (s32[], /*index=1*/f32[8,4]{{1,0:T(8,128)(2,1)}}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,4]{{1,0}} get-tuple-element(%loop), index=1
}}
"""
SIZE = 8 * 4 * 4  # bytes of f32[8,4]


def in_loop(collective: str, hosts: list[int] = ONE_HOST, direction: str = "LT") -> Traffic:
    return traffic(MODULE.format(collective=collective, direction=direction), hosts)


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={}", 8),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
    ],
)
def test_groups_as_compilers_write_them(groups: str, devices: int) -> None:
    (found,) = in_loop(f"%r = f32[8,4]{{1,0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add").collectives
    sent = 5 * 2 * SIZE * (devices - 1) / devices
    assert (found.kind, found.count, found.payload) == ("all-reduce", 5, 5 * SIZE)
    assert found.sent == pytest.approx(sent)


def test_what_slices_of_tpus_send_each_other_is_between_hosts() -> None:
    text = (
        "%s = (f32[8,4]{1,0}, u32[], token[]) send(%x, %after), channel_id=6, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2:4}x{0:1}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    (found,) = in_loop(text, [0, 0, 1, 1, 2, 2, 3, 3]).collectives
    assert (found.kind, found.count, found.payload) == ("all-reduce", 5, 5 * SIZE)
    assert found.between_hosts == found.sent == pytest.approx(5 * 2 * SIZE * 3 / 4)
    assert in_loop("%s = (f32[8,4], u32[], token[]) send(%x, %after), is_host_transfer=true").collectives == ()


def test_groups_of_one_send_nothing() -> None:
    text = "%r = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add"
    assert in_loop(text).collectives == ()


def test_an_asynchronous_gather_is_counted_once_and_by_what_it_gathers() -> None:
    text = (
        "%s = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}\n"
        "  %d = f32[64,4]{1,0} all-gather-done(%s)"
    )
    (found,) = in_loop(text).collectives
    assert (found.kind, found.count, found.payload) == ("all-gather", 5, 5 * 8 * SIZE)
    assert found.sent == pytest.approx(5 * 7 * SIZE)


def test_the_parts_of_a_chain_are_one_collective() -> None:
    part = '%{0} = f32[64,4]{{1,0}} all-gather(%x), replica_groups=[1,8]<=[8], frontend_attributes={{chain_id="3"}}'
    (found,) = in_loop("\n  ".join(part.format(name) for name in ("s", "m", "d"))).collectives
    assert found.count == 5


def test_what_leaves_the_host_is_shared_by_its_devices() -> None:
    text = "%r = f32[8,4]{1,0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add"
    (found,) = in_loop(text, hosts=[0, 0, 0, 0, 1, 1, 1, 1]).collectives
    assert found.between_hosts == pytest.approx(5 * 2 * SIZE / 2 / 4)
    text = "%r = f32[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,0},{1,2},{2,1},{5,4}}"
    (found,) = in_loop(text, hosts=[0, 0, 0, 0, 1, 1, 1, 1]).collectives
    assert (found.sent, found.between_hosts) == (5 * SIZE, 5 * SIZE)


def test_a_loop_of_unknown_length_is_said() -> None:
    text = "%r = f32[8,4]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add"
    found = in_loop(text, direction="NE")
    assert found.unknown_loops == 1
    assert found.collectives[0].count == 1

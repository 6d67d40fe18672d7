"""A byte-level model that SmallCoder JAX exported, in PyTorch: stages of recurrent blocks, with dynamic chunking
between them (H-Net, arXiv 2507.07955), and ternary weights (BitNet b1.58, arXiv 2402.17764).

It computes what the JAX model computes, for rows that hold one text each and are padded on either side. It generates
with a state of constant size, and the stages within advance only where a chunk begins. It cannot be trained here.

Shapes: B rows, T positions, M chunks of a row, D width of a stage, E width of the stage within.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_smallcoder_hnet import SmallcoderHnetConfig
from .layers_smallcoder_hnet import BitLinear, Row, Stack, State, latest, make_row, projection, recurrence, wide

LEAST, MOST = float(np.float32(1e-4)), float(np.float32(1.0 - 1e-4))  # shares of a chunk in its smoothed output
SMALLEST_NORM = float(np.float32(1e-16))  # squared: a vector that is shorter is not normalised to length 1


class Router(nn.Module):
    """The probability that a position begins a chunk: p_t = (1 - cos(query_{t-1}, key_t)) / 2 (eq. 4)."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x_BTD: Tensor, row: Row, state: State) -> Tensor:
        x_BTD = x_BTD.to(torch.promote_types(wide(x_BTD).dtype, self.query.weight.dtype))
        q_BTD, k_BTD = (functional.linear(x_BTD, wide(each.weight)) for each in (self.query, self.key))
        before_BD = state.get("query", torch.zeros_like(q_BTD[:, 0]))
        all_BTD = torch.cat([before_BD[:, None], q_BTD], dim=1)
        real_BT = torch.cat([torch.ones_like(row.real_BT[:, :1]), row.real_BT], dim=1)
        state["query"] = latest(all_BTD, real_BT, 1)[:, 0]
        cosine_BT = (_directions(all_BTD[:, :-1]) * _directions(k_BTD)).sum(dim=-1)
        return torch.where(row.starts_BT, 1.0, ((1.0 - cosine_BT) / 2.0).clamp(0.0, 1.0))


def _directions(x_BTD: Tensor) -> Tensor:
    return x_BTD * torch.rsqrt(x_BTD.square().sum(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM))


class Inner(nn.Module):
    """The innermost stage: blocks alone."""

    def __init__(self, config: SmallcoderHnetConfig):
        super().__init__()
        kinds = (config.pattern * config.blocks)[: config.blocks]
        self.stack = Stack(config, len(config.inner_widths), kinds)

    def forward(self, x_BTD: Tensor, row: Row, state: State, boundaries: list[Tensor]) -> Tensor:
        return self.stack(x_BTD, row, state.setdefault("stack", {}))


class Outer(nn.Module):
    """A stage with another within: blocks, chunks, the stage within on the chunks, and blocks again."""

    def __init__(self, config: SmallcoderHnetConfig, stage: int):
        super().__init__()
        self.width, within = config.widths[stage : stage + 2]
        self.encoder = Stack(config, stage, "x" * config.encoder_blocks[stage])
        self.router = Router(self.width)
        self.residual = nn.Linear(self.width, self.width)
        self.wider = nn.Parameter(torch.zeros(within - self.width))
        self.inner = make_stage(config, stage + 1)
        self.decoder = Stack(config, stage, "x" * config.decoder_blocks[stage])

    def forward(self, x_BTD: Tensor, row: Row, state: State, boundaries: list[Tensor]) -> Tensor:
        """The states after this stage. Appends where chunks begin, [B, T], to `boundaries`, and then those within."""
        encoded_BTD = self.encoder(x_BTD, row, state.setdefault("encoder", {}))
        probability_BT = self.router(encoded_BTD, row, state.setdefault("router", {}))
        boundary_BT = (probability_BT > 0.5) & row.real_BT
        boundaries.append(boundary_BT)
        back_BTD = self._chunked(encoded_BTD, probability_BT, boundary_BT, state, boundaries)
        back_BTD = torch.where(row.real_BT[..., None], back_BTD, 0.0)
        weight, bias = wide(self.residual.weight), wide(self.residual.bias)
        mixed_BTD = back_BTD + functional.linear(encoded_BTD.to(weight.dtype), weight, bias)
        return self.decoder(mixed_BTD.to(x_BTD.dtype), row, state.setdefault("decoder", {}))

    def _chunked(
        self, x_BTD: Tensor, share_BT: Tensor, boundary_BT: Tensor, state: State, boundaries: list[Tensor]
    ) -> Tensor:
        """The smoothed output of each position's chunk: z_m = q_m output_m + (1 - q_m) z_{m-1} (eq. 5), where q is the
        share of the chunk. Where no chunk begins, nothing is computed within."""
        before_BD = state.get("smoothed", wide(torch.zeros_like(x_BTD[:, 0])))
        z_BMD = before_BD[:, None]  # slot 0: the chunk before
        counted_BT = torch.cumsum(boundary_BT.long(), dim=1)
        room = int(counted_BT[:, -1].max())
        if room:
            rows, columns = boundary_BT.nonzero(as_tuple=True)
            slots = counted_BT[rows, columns] - 1
            chunks_BMD = x_BTD.new_zeros((x_BTD.shape[0], room, self.width))
            chunks_BMD[rows, slots] = x_BTD[rows, columns]
            filled_BM = torch.arange(room, device=x_BTD.device) < counted_BT[:, -1:]
            row = make_row(filled_BM, state.setdefault("chunks", {}))
            x_BME = torch.cat([chunks_BMD, self.wider.expand(*chunks_BMD.shape[:2], -1).to(x_BTD.dtype)], dim=-1)
            outputs_BMD = self.inner(x_BME, row, state.setdefault("inner", {}), boundaries)[..., : self.width]
            share_BM = share_BT.new_zeros(filled_BM.shape)
            share_BM[rows, slots] = share_BT[rows, columns].clamp(LEAST, MOST)
            share_BM = torch.where(row.starts_BT, 1.0, share_BM)[..., None]
            keep_BMD = (1.0 - share_BM).expand_as(outputs_BMD)
            z_BMD = torch.cat([z_BMD, recurrence(keep_BMD, share_BM * wide(outputs_BMD), before_BD)], dim=1)
        state["smoothed"] = z_BMD[:, -1]
        return z_BMD.gather(1, counted_BT[..., None].expand(-1, -1, self.width))


def make_stage(config: SmallcoderHnetConfig, stage: int) -> Outer | Inner:
    return Inner(config) if stage == len(config.inner_widths) else Outer(config, stage)


class SmallcoderHnetState:
    """All that the model keeps of a text, and how many columns of its row it has read."""

    def __init__(self) -> None:
        self.columns, self.parts = 0, {}

    def reorder(self, rows: Tensor) -> None:
        """Takes the states of these rows, in this order."""

        def taken(part: State) -> State:
            return {
                name: taken(x) if isinstance(x, dict) else x.index_select(0, rows.to(x.device))
                for name, x in part.items()
            }

        self.parts = taken(self.parts)


@dataclasses.dataclass
class SmallcoderHnetOutput(ModelOutput):
    """`boundaries` holds where the chunks of each stage begin: [B, T] outermost, then [B, M] for the chunks of the
    stage before. `state` continues the text."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: SmallcoderHnetState | None = None
    boundaries: tuple[Tensor, ...] | None = None


class SmallcoderHnetForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head; see the top of the file."""

    config_class = SmallcoderHnetConfig
    _is_stateful = True  # so that transformers does not take tokens back, which a recurrence cannot

    def __init__(self, config: SmallcoderHnetConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.stage = make_stage(config, 0)
        self.head = projection(config, 0, config.width, config.vocab_size)
        for name, module in self.named_modules():
            if isinstance(module, BitLinear):
                module.name = name
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: SmallcoderHnetState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> SmallcoderHnetOutput | tuple:
        """Logits [B, T, vocabulary]. `attention_mask` is 0 at padding; with a `state`, its last columns are those of
        `input_ids`. `position_ids` follow from it and are not read. The mean loss of `labels` leaves out -100.
        """
        if self.training:
            raise ValueError("this code does not train: rounding has no gradient in it. Call model.eval() first")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real_BT = attention_mask[:, -input_ids.shape[1] :].to(input_ids.device) > 0
        if real_BT.shape != input_ids.shape:
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} is shorter than {tuple(input_ids.shape)}")
        state = SmallcoderHnetState() if state is None else state
        row = make_row(real_BT, state.parts.setdefault("text", {}))
        boundaries: list[Tensor] = []
        x_BTD = self.stage(self.embed(input_ids), row, state.parts.setdefault("stage", {}), boundaries)
        state.columns += input_ids.shape[1]
        logits_BTV = wide(self.head(x_BTD[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        kept = state if (self.config.use_cache if use_cache is None else use_cache) else None
        output = SmallcoderHnetOutput(loss=loss, logits=logits_BTV, state=kept, boundaries=tuple(boundaries))
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: SmallcoderHnetState | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        new = input_ids if state is None else input_ids[:, state.columns :]
        given = {"attention_mask": attention_mask, "state": state, "use_cache": use_cache}
        return {"input_ids": new, "logits_to_keep": 1, **given}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> dict[str, Any]:
        if outputs.get("state") is not None:
            model_kwargs["state"] = outputs["state"]
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *arguments, **options)

    def _reorder_cache(self, state: SmallcoderHnetState, beam_idx: Tensor) -> SmallcoderHnetState:
        state.reorder(beam_idx)
        return state

    @classmethod
    def _supports_default_dynamic_cache(cls, *_: Any) -> bool:
        return False  # its state is no list of keys and values

"""Checks that an exported folder is the model it was made from, with `transformers` on the CPU.

Logits are compared in float32, or in float64 where the model decides (`Published.decide`). A ternary layer rounds its
input to 8 bits: where an activation is within a few float32 roundings of a half, two correct programs round it to
different whole numbers, the layers behind that one carry the difference on to others, and logits differ as much as
rounding to 8 bits itself changes them: with six blocks of width 512 and logits of spread 0.27, by 0.045. No tolerance
in float32 could tell such a model from a wrong one, because it would have to allow more than many mistakes change: an
epsilon of 1e-5 instead of 1e-6 moves logits by 0.01. In float64 such a case is about 10^9 times as rare, and two
correct programs agree to 1e-15.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from smallcoder_jax.base.errors import CheckFailed
from smallcoder_jax.config import ComputeConfig, ModelConfig
from smallcoder_jax.huggingface import tokenizer as export_tokenizer
from smallcoder_jax.huggingface.double import in_float64
from smallcoder_jax.huggingface.reference import import_transformers, load, quiet
from smallcoder_jax.models import build
from smallcoder_jax.models.families import published
from smallcoder_jax.tokenizers import base, chat

TOLERANCE = 1e-4  # largest difference of a logit in float32
TOLERANCE_64 = 1e-9  # and in float64: a thousand times what rounding adds up to, a hundred thousandth of 1e-4
GREEDY_TOKENS, PROMPT_TOKENS = 64, 64
LENGTHS = (1, 7, 64, 512)  # lengths beyond the context are replaced by the context itself
# Prompts of the greedy continuations, in addition to the caller's.
PROMPTS = ("def fibonacci(n):\n", "import os\n\n\nclass ", "")

_CHAT = chat.Conversation((chat.Message("user", "hi  there"), chat.Message("assistant", "x = 1\n")))
_TOOL_CHAT = chat.Conversation(
    (
        chat.Message("system", "Be brief."),
        *_CHAT.messages,
        chat.Message("user", "1 + 1?"),
        chat.Message("assistant", "I add.", (chat.ToolCall("add", {"a": 1, "b": [1.5, None, "é"]}),) * 2),
        chat.Message("tool", "2"),
        chat.Message("tool", ""),
    ),
    ({"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},),
)

# Ids and mask [B, T] to logits [B, T, V], and to the masks of what the model decides.
_Forward = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Sequence[np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: what was found, what is allowed, and whether it passed."""

    name: str
    found: str
    allowed: str
    passed: bool


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """All comparisons of one folder, and the versions they were made with."""

    checks: tuple[Check, ...]
    tolerance: float
    lengths: tuple[int, ...]
    texts: int
    greedy_tokens: int
    largest_difference: float
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The whole report, for JSON."""
        return {**dataclasses.asdict(self), "passed": self.passed}

    def record(self) -> dict[str, Any]:
        """The facts for the model card: what was compared and the limit, without numbers that depend on the machine."""
        return {
            "checked": True,
            "tolerance": self.tolerance,
            "lengths": list(self.lengths),
            "texts": self.texts,
            "greedy_tokens": self.greedy_tokens,
        }

    def table(self) -> str:
        """The comparisons as text, one line each."""
        rows = [("check", "found", "allowed", "")]
        rows += [(check.name, check.found, check.allowed, "ok" if check.passed else "FAILED") for check in self.checks]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def check(
    folder: Path,
    model: ModelConfig,
    params: build.Params,
    tokenizer: base.Tokenizer,
    *,
    texts: Sequence[str] = (),
    lengths: Sequence[int] = LENGTHS,
    tolerance: float | None = None,
) -> ParityReport:
    """Compares `folder`, loaded by `transformers`, with the model in this program. Code in the folder is executed only
    if it is, byte for byte, what this program brings for such models.

    It compares the logits, and what the model decides, for every length in `lengths` that the context allows, and for
    batches padded left and right; the ids of `texts` and of hard texts, and the texts decoded from them; special pieces
    and the chat template; and greedy continuations. `params` are unrolled, with the values that were stored. Raises
    CheckFailed with the table when anything differs, and UserError when torch or transformers is not installed.
    """
    if tolerance is None:
        tolerance = TOLERANCE if published(model).decide is None else TOLERANCE_64
    torch, transformers = import_transformers()
    with quiet(transformers):
        theirs, theirs_tokenizer, problems = load(folder, model, transformers, torch)
    ours = _our_forward(model, params)
    lengths = sorted({min(length, model.context) for length in lengths})
    samples = [*hard_texts(tokenizer), *texts]
    checks = [Check("tensors loaded", problems or "all", "all", not problems)]
    differences = []
    for name, ids_BT, mask_BT in _logit_cases(model, tokenizer, texts, lengths):
        (our_logits, our_masks), (their_logits, their_masks) = (
            ours(ids_BT, mask_BT),
            _their_forward(theirs, torch, ids_BT, mask_BT),
        )
        if our_masks:
            checks.append(_compare_masks(name, our_masks, their_masks))
        difference = _difference(our_logits, their_logits, mask_BT)
        differences.append(difference)
        checks.append(Check(f"logits: {name}", f"{difference:.1e}", f"{tolerance:.0e}", difference <= tolerance))
    with quiet(transformers):
        checks.append(_compare_ids(tokenizer, theirs_tokenizer, samples))
        foreign = export_tokenizer.is_published(folder)
        checks.append(_compare_specials(tokenizer, theirs_tokenizer, foreign))
        if not foreign:
            checks.append(_compare_decoding(tokenizer, theirs_tokenizer, samples))
        if not foreign and chat.has_chat(tokenizer):
            checks.append(_compare_chat(tokenizer, theirs_tokenizer))
    tokens = min(GREEDY_TOKENS, max(1, model.context // 2))
    for text in [*PROMPTS, *texts[:2]]:
        prompt = [tokenizer.bos_id, *tokenizer.encode(text)][: min(PROMPT_TOKENS, model.context - tokens)]
        checks.append(
            _compare_greedy(ours, theirs, torch, transformers, tokenizer, prompt, tokens, model.context, tolerance)
        )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")}
    largest = float(np.max(differences))
    report = ParityReport(tuple(checks), tolerance, tuple(lengths), len(samples), tokens, largest, versions)
    if not report.passed:
        raise CheckFailed(f"the exported model is not the model it was made from ({folder}):\n{report.table()}")
    return report


def hard_texts(tokenizer: base.Tokenizer) -> list[str]:
    """Texts on which tokenizers are known to differ. They are the same at every call."""
    rng = np.random.default_rng(0)
    planes = []
    for plane in range(17):
        points = 0x10000 * plane + rng.integers(0, 0x10000, 64)
        planes.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    noise = [rng.integers(0, 256, 200, dtype=np.uint8).tobytes().decode("utf-8", "replace") for _ in range(8)]
    parts = [" ", "  ", "\t", "\n", "\r\n", "a", "def ", "self.", "(", "0", "12", "é", "😀", "\u2581", "<", "</s>", "="]
    mixtures = ["".join(rng.choice(parts, 40)) for _ in range(64)]
    runs = [character * int(length) for character in " \n\t-=#a\u2581" for length in rng.integers(2, 300, 4)]
    return [
        "",
        " ",
        "\n",
        "  leading and trailing  ",
        "def f(x):\n\treturn x  # tab\n",
        "a\r\nb\r\n\r\n",
        "naïve café 中文 العربية 👩‍👩‍👧‍👦 e\u0301 \ufeff \u00a0 \u2028 \u0085 \x0b\x0c",
        "\x00 \x01 \x7f",
        "\u2581literal\u2581\u2581lower one eighth block\u2581 ",
        "<0x0A> <0xFF> <unk> [UNK] \\n \\u2581",
        "x = 1; " * 4000,
        "y" * 20_000,
        " ".join(tokenizer.specials),
        "".join(tokenizer.specials),
        *[f"a{piece}b {piece}" for piece in tokenizer.specials],
        *planes,
        *noise,
        *mixtures,
        *runs,
    ]


def _our_forward(model: ModelConfig, params: build.Params) -> _Forward:
    # Rounding differs between devices by more than the tolerance, and transformers runs on the CPU as well.
    cpu = jax.local_devices(backend="cpu")[0]
    placed = jax.device_put(params, cpu)

    decide = published(model).decide
    compute = functools.partial(_outputs, model)
    outputs = jax.jit(compute) if decide is None else in_float64(compute)

    def forward(ids_BT: np.ndarray, mask_BT: np.ndarray) -> tuple[np.ndarray, Sequence[np.ndarray]]:
        inputs = [value.astype(np.int32) for value in (ids_BT, _positions(mask_BT), mask_BT)]
        logits_BTV, masks = outputs(placed, *jax.device_put(inputs, cpu))
        return np.asarray(logits_BTV), [np.asarray(mask) for mask in masks]

    return forward


def _outputs(
    model: ModelConfig, params: build.Params, ids_BT: Array, positions_BT: Array, mask_BT: Array
) -> tuple[Array, Sequence[Array]]:
    graph, _ = build.abstract_model(model, ComputeConfig(dtype="float32", attention="xla"))
    module, decide = build.bind(graph, params), published(model).decide
    if decide is None:
        return build.logits(module, module(ids_BT, positions_BT, mask_BT).states_BTD), ()
    states_BTD, masks = decide(module, ids_BT, positions_BT, mask_BT)
    return build.logits(module, states_BTD), masks


def _positions(mask_BT: np.ndarray) -> np.ndarray:
    return np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0)


def _their_forward(
    theirs: Any, torch: Any, ids_BT: np.ndarray, mask_BT: np.ndarray
) -> tuple[np.ndarray, Sequence[np.ndarray]]:
    with torch.inference_mode():
        output = theirs(
            input_ids=torch.from_numpy(ids_BT),
            attention_mask=torch.from_numpy(mask_BT),
            position_ids=torch.from_numpy(_positions(mask_BT)),
            use_cache=False,
        )
    return output.logits.numpy(), [mask.numpy() for mask in output.get("boundaries") or ()]


def _compare_masks(name: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Check:
    """Checks that both decide alike everywhere. Our masks may have more columns, which must be empty."""
    count = f"{sum(int(mask.sum()) for mask in ours)} in {len(ours)} masks"
    fits = len(theirs) >= len(ours) and all(
        mine.shape[1] >= other.shape[1] for mine, other in zip(ours, theirs, strict=False)
    )
    if not fits:
        return Check(f"boundaries: {name}", "other shapes", f"all of {count}", False)
    wrong = 0
    for mine, other in zip(ours, theirs, strict=False):
        padded = np.pad(other, [(0, 0), (0, mine.shape[1] - other.shape[1])])
        wrong += int(np.sum(padded != mine))
    return Check(f"boundaries: {name}", f"{wrong} differ" if wrong else "all", f"all of {count}", not wrong)


def _difference(ours_BTV: np.ndarray, theirs_BTV: np.ndarray, mask_BT: np.ndarray) -> float:
    """The largest difference over real tokens; infinite when a logit is not finite or the vocabularies differ."""
    if ours_BTV.shape != theirs_BTV.shape:
        return float("inf")
    real = mask_BT.astype(bool)
    difference = float(np.max(np.abs(ours_BTV[real] - theirs_BTV[real])))
    return difference if np.isfinite(difference) else float("inf")


def _logit_cases(
    model: ModelConfig, tokenizer: base.Tokenizer, texts: Sequence[str], lengths: Sequence[int]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The name, ids and mask of each batch: one row of random ids and one of text, and rows of unequal lengths."""
    rng = np.random.default_rng(0)
    written = [tokenizer.bos_id, *tokenizer.encode("\n".join([*texts, *PROMPTS]))]

    def rows(length: int) -> np.ndarray:
        return np.stack([rng.integers(0, model.vocab_size, length), np.resize(written, length)]).astype(np.int64)

    for length in lengths:
        yield f"{length} tokens", rows(length), np.ones((2, length), np.int64)
    longest = min(64, model.context)
    unequal = [longest, max(1, longest // 3), 1, max(1, longest - 1)]
    for side in ("left", "right"):
        ids_BT = np.concatenate([rows(longest), rows(longest)])
        mask_BT = np.zeros_like(ids_BT)
        for row, length in enumerate(unequal):
            mask_BT[row, longest - length if side == "left" else 0 : longest if side == "left" else length] = 1
        yield f"padded {side}", np.where(mask_BT == 1, ids_BT, tokenizer.pad_id), mask_BT


def _compare_ids(tokenizer: base.Tokenizer, theirs: Any, texts: Sequence[str]) -> Check:
    def encode(text: str) -> list[int]:
        return theirs.encode(text, add_special_tokens=False, split_special_tokens=True)

    # Some published tokenizers put a space before a text, which ours removes again. After a newline, they agree.
    lead = [] if encode("a") == tokenizer.encode("a") else encode("\n")
    before = "\n" if lead else ""
    wrong = [text for text in texts if tokenizer.encode(text) != encode(before + text)[len(lead) :]]
    found = f"{len(texts) - len(wrong)} of {len(texts)}" + (" behind a newline" if lead else "")
    found += f", not {wrong[0][:40]!r}" if wrong else ""
    return Check("token ids of texts", found, "all", not wrong)


def _compare_specials(tokenizer: base.Tokenizer, theirs: Any, published: bool) -> Check:
    """Checks that each special piece is parsed as its one id, and that BOS and EOS are the same and in the same place.

    Published tokenizers have pieces with other names, and their texts may begin without BOS, so only the ids of BOS and
    EOS are compared for them.
    """
    pieces = {} if published else tokenizer.specials
    wrong = [piece for piece, i in pieces.items() if theirs.encode(piece, add_special_tokens=False) != [i]]
    named = {"beginning": (theirs.bos_token_id, tokenizer.bos_id), "end": (theirs.eos_token_id, tokenizer.eos_id)}
    wrong += [name for name, (their_id, our_id) in named.items() if their_id not in (our_id, None)]
    begins = published or theirs.encode("a") == [tokenizer.bos_id, *tokenizer.encode("a")]
    wrong += [] if begins else ["beginning in front of a text"]
    count = len(pieces) + len(named) + (not published)
    found = f"{count - len(wrong)} of {count}" + (f", not {', '.join(wrong[:3])}" if wrong else "")
    return Check("special pieces", found, "all", not wrong)


def _compare_decoding(tokenizer: base.Tokenizer, theirs: Any, texts: Sequence[str]) -> Check:
    ids = {text: tokenizer.encode(text) for text in texts}
    wrong = [text for text in texts if theirs.decode(ids[text]) != tokenizer.decode(ids[text])]
    found = f"{len(texts) - len(wrong)} of {len(texts)}" + (f", not {wrong[0][:40]!r}" if wrong else "")
    return Check("text of token ids", found, "all", not wrong)


def _compare_chat(tokenizer: base.Tokenizer, theirs: Any) -> Check:
    """Checks that a conversation gets the ids of training, with function calls if the tokenizer has such pieces."""
    conversation, tools = _CHAT, []
    if all(piece in tokenizer.specials for piece in base.TOOL_PIECES):
        conversation, tools = _TOOL_CHAT, list(_TOOL_CHAT.tools)
    messages = [dataclasses.asdict(message) for message in conversation.messages]
    expected = chat.encode(conversation, tokenizer, reply=True).ids.tolist()
    found = list(theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"])
    return Check("chat template", "same ids" if found == expected else "other ids", "same ids", found == expected)


def _compare_greedy(
    ours: _Forward,
    theirs: Any,
    torch: Any,
    transformers: Any,
    tokenizer: base.Tokenizer,
    prompt: list[int],
    tokens: int,
    context: int,
    tolerance: float,
) -> Check:
    """Checks that each token that `transformers` chooses, with its cache, is also our choice after the previous ones.

    Then our own greedy continuation is the same. When the two best logits differ by no more than rounding (twice the
    tolerance, once for each logit), the choices may differ. They count as the same, and the report mentions them.
    """
    # Without an end token, so that all tokens are compared.
    theirs.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_id
    )
    ids = torch.tensor([prompt])
    with torch.inference_mode(), quiet(transformers):
        whole_T = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0].numpy()
    chosen = whole_T[len(prompt) :]
    # Padded to the same length for every prompt, so that it is compiled once.
    ids_BT = np.full((1, min(GREEDY_TOKENS + PROMPT_TOKENS, max(context, len(whole_T)))), tokenizer.pad_id)
    ids_BT[0, : len(whole_T)] = whole_T
    mask_BT = (np.arange(ids_BT.shape[1]) < len(whole_T)).astype(np.int64)[None, :]
    logits_TV = ours(ids_BT, mask_BT)[0][0, len(prompt) - 1 : len(whole_T) - 1]
    behind = logits_TV.max(axis=-1) - logits_TV[np.arange(len(chosen)), chosen]
    same = int(np.sum(behind == 0))
    near = int(np.sum((behind > 0) & (behind <= 2 * tolerance)))
    found = f"{same + near} of {len(chosen)} tokens" + (f", {near} by rounding" if near else "")
    name = f"greedy after {len(prompt)} tokens"
    return Check(name, found, f"{tokens} of {tokens}", len(chosen) == tokens and same + near == tokens)

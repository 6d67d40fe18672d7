"""Completions of a tiny random model, against its full forward pass."""

import contextlib
import dataclasses
import itertools
import logging
import re
import types

import jax
import numpy as np
import pytest

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import ComputeConfig, MeshConfig
from smallcoder_jax.generate import engine, step
from smallcoder_jax.generate.sampling import SamplingOptions
from smallcoder_jax.mesh import make_mesh, params_sharding
from smallcoder_jax.models import build
from smallcoder_jax.models.decoder import cache as kv_cache
from smallcoder_jax.models.decoder.sharding import RULES
from smallcoder_jax.tokenizers.base import END_PIECES, EOS, IM_END
from smallcoder_jax.tokenizers.bytes import ByteTokenizer
from tests.helpers import CAPTURES

COMPUTE = ComputeConfig(dtype="float32")
GREEDY = SamplingOptions(max_tokens=12, temperature=0.0)
GPT2 = {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "bias": "all", "embeddings": "untied"}
SAMPLED = SamplingOptions(max_tokens=12, temperature=1.2, top_k=0, top_p=0.95, seed=5)


def expected_greedy(tiny, text, count):
    """The greedy continuation without a cache, among the ids that may be produced, until EOS or IM_END."""
    tokenizer = ByteTokenizer()
    ends = {tokenizer.specials[EOS], tokenizer.specials[IM_END], 250}
    forbidden = [i for i in range(256) if not tokenizer.token_bytes[i] and i not in ends]
    ids, produced = [tokenizer.bos_id, *tokenizer.encode(text)], []
    while len(produced) < count and not ends.intersection(produced):
        scores = tiny.scores(ids + produced)[-1]
        scores[forbidden] = -np.inf
        produced.append(int(scores.argmax()))
    return tuple(produced)


@contextlib.contextmanager
def compilations(caplog):
    """Collects the names of what XLA compiles inside."""
    names = []
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        before = len(caplog.records)
        yield names
    for record in caplog.records[before:]:
        if found := re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()):
            names.append(found[1])


# 1, 17 and 18 tokens with the BOS; all but the last are padded to 16, 16 and 24.
@pytest.mark.parametrize("prompt", ["", "for i in range(9", "for i in range(99"])
def test_greedy_is_that_of_the_uncached_forward_pass(tiny, prompt):
    (completion,) = tiny.generator().generate([prompt], GREEDY)
    assert completion.token_ids == expected_greedy(tiny, prompt, 12)
    assert completion.prompt_tokens == 1 + len(prompt)


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 6},
        GPT2,
    ],
    ids=["window", "gpt2"],
)
def test_other_decoders_generate_what_they_compute(make_tiny, changes):
    other = make_tiny(**changes)
    prompts = ["import os", "a"]
    completions = other.generator().generate(prompts, GREEDY)
    assert [c.token_ids for c in completions] == [expected_greedy(other, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(tiny, options):
    prompts = ["a", "def quicksort(items):", "import sys\n"]
    generator = tiny.generator()
    alone = [generator.generate([prompt], options)[0].token_ids for prompt in prompts]
    assert [c.token_ids for c in generator.generate(prompts, options)] == alone
    assert [c.token_ids for c in generator.generate(prompts[::-1], options, batch_size=2)] == alone[::-1]
    assert len(set(alone)) == len(alone)


def test_a_prompt_of_several_completions_is_read_once(tiny, monkeypatch):
    options = dataclasses.replace(SAMPLED, num_samples=3)
    generator = tiny.generator()
    alone = [completion for prompt in ("a", "import sys") for completion in generator.generate([prompt], options)]
    read, prefill = [], step.prefill
    monkeypatch.setattr(
        step, "prefill", lambda params, prompts, **shape: read.append(prompts) or prefill(params, prompts, **shape)
    )
    together = generator.generate(["a", "import sys"], options)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in together}) == 6
    (prompts,) = read
    assert prompts.tokens_UP.shape == (2, 16)
    assert prompts.prompt_of_B.tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert prompts.unused_B.tolist() == [False] * 6 + [True] * 2


@CAPTURES
def test_the_cache_takes_several_tokens_at_once(tiny):
    ids = np.random.default_rng(0).integers(0, 240, size=(2, 20)).astype(np.int32)
    padding = np.array([0, 4])
    segments = (np.arange(20)[None] >= padding[:, None]).astype(np.int32)
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0).astype(np.int32)
    graph, _ = build.abstract_model(tiny.model, COMPUTE)
    decoder = build.bind(graph, tiny.params)
    extend = jax.jit(decoder.extend)
    cache = kv_cache.init_cache(tiny.model, COMPUTE, 2, 24)
    parts = []
    for start, end in itertools.pairwise([0, 7, 8, 13, 20]):
        part = [x[:, start:end] for x in (ids, positions, segments)]
        hidden, cache = extend(*part, cache)
        parts.append(build.logits(decoder, hidden))
    got = np.concatenate(parts, axis=1)
    for row in range(2):
        expected = tiny.scores(ids[row, padding[row] :].tolist())
        np.testing.assert_allclose(got[row, padding[row] :], expected, atol=1e-5)


def test_options_and_parameters_change_without_compiling(tiny, caplog):
    tiny.generator().generate(["warm", "up"], SAMPLED)
    halved = jax.tree.map(lambda x: x * np.float32(0.5), tiny.params)
    changes = [
        {"temperature": 0.0},
        {"temperature": 0.1, "top_k": 3},
        {"top_p": 0.2, "repetition_penalty": 1.7},
        {"seed": 99, "stop": ("x",)},
        {"max_tokens": 9},
    ]
    with compilations(caplog) as compiled:
        for change in changes:
            tiny.generator(params=halved).generate(["other", "ones"], dataclasses.replace(SAMPLED, **change))
    assert compiled == []


def test_one_prefill_and_one_decode_are_compiled(make_tiny, caplog):
    fresh = make_tiny(width=32, mlp_width=48).generator()
    with compilations(caplog) as compiled:
        fresh.generate(["a", "bc", "def"], dataclasses.replace(SAMPLED, max_tokens=5))
    assert sorted(compiled) == ["decode", "prefill"]


def test_a_row_that_ends_early_stops_alone_and_the_loop_stops_with_the_last(tiny, ending_at, monkeypatch):
    prompts = ["def add(a, b):", "import"]
    options = dataclasses.replace(GREEDY, max_tokens=30)
    free = [c.token_ids for c in tiny.generator().generate(prompts, options)]
    # A token of the first continuation that the second reaches later or never.
    end = next(token for token in free[0][2:] if token not in free[1][:8])
    stops = [ids.index(end) + 1 if end in ids else 30 for ids in free]
    assert stops[0] < stops[1]
    decoded, decode = [], step.decode

    def record(*args, **keywords):
        state, produced = decode(*args, **keywords)
        decoded.append(np.asarray(produced.tokens_B))
        return state, produced

    monkeypatch.setattr(step, "decode", record)
    completions = tiny.generator(ending_at(end)).generate(prompts, options)
    assert [c.token_ids for c in completions] == [ids[:stop] for ids, stop in zip(free, stops, strict=True)]
    assert [c.finish_reason for c in completions] == ["stop" if stop < 30 else "length" for stop in stops]
    after_the_end = [tokens[1] for tokens in decoded[stops[0] :]]
    # The shorter prompt is the first row on the device.
    assert after_the_end == [ByteTokenizer().pad_id] * (len(decoded) - stops[0])
    decoded.clear()
    (alone,) = tiny.generator(ending_at(end)).generate(prompts[:1], options)
    assert alone.token_ids == free[0][: stops[0]]
    assert len(decoded) == stops[0] + 1  # one ahead of the last token that was read


def test_an_ending_token_gives_no_text_and_counts_as_produced(tiny, ending_at):
    prompt = "def add(a, b):"
    (free,) = tiny.generator().generate([prompt], GREEDY)
    end = free.token_ids[4]
    (completion,) = tiny.generator(ending_at(end)).generate([prompt], GREEDY)
    ids = completion.token_ids
    assert ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert completion.text == ByteTokenizer().decode(list(ids[:-1]))
    assert len(completion.logprobs) == len(ids)


def test_a_stop_string_ends_the_text_before_it(tiny):
    options = dataclasses.replace(SAMPLED, max_tokens=60)
    (free,) = tiny.generator().generate(["a = "], options)
    stop = free.text[10:12]
    (completion,) = tiny.generator().generate(["a = "], dataclasses.replace(options, stop=("never", stop)))
    assert completion.text == free.text[: free.text.index(stop)]
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) < 60
    assert completion.token_ids == free.token_ids[: len(completion.token_ids)]


def test_the_rate_counts_what_was_really_produced(tiny, ending_at, monkeypatch):
    clock = itertools.count()  # one second per step
    prompt = "def add(a, b):"
    (free,) = tiny.generator().generate([prompt], SAMPLED)
    produced, end = next((i + 1, t) for i, t in enumerate(free.token_ids) if i > 3 and t not in free.token_ids[:i])
    monkeypatch.setattr(engine, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    (completion,) = tiny.generator(ending_at(end)).generate([prompt], SAMPLED)
    assert len(completion.token_ids) == produced
    assert completion.tokens_per_second == pytest.approx(1.0)


def test_a_seed_decides_everything_and_samples_differ(tiny):
    options = dataclasses.replace(SAMPLED, num_samples=3)
    first = tiny.generator().generate(["a", "b"], options)
    again = tiny.generator().generate(["a", "b"], options, batch_size=2)
    other = tiny.generator().generate(["a", "b"], dataclasses.replace(options, seed=6))
    assert [c.prompt for c in first] == ["a"] * 3 + ["b"] * 3
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert len({c.token_ids for c in [*first, *other]}) == 12


def test_every_step_draws_anew(tiny):
    indifferent = jax.tree.map(np.zeros_like, tiny.params)
    (completion,) = tiny.generator(params=indifferent).generate(["a"], SAMPLED)
    assert len(set(completion.token_ids)) > 8


def test_specials_are_never_produced_and_ends_are(tiny):
    # The random model gives every id about the same probability.
    options = SamplingOptions(max_tokens=80, temperature=3.0, top_k=0, top_p=1.0, num_samples=32)
    completions = tiny.generator().generate([""], options)
    produced = set(itertools.chain.from_iterable(c.token_ids for c in completions))
    specials = set(ByteTokenizer().specials.values())
    ends = {ByteTokenizer().specials[piece] for piece in END_PIECES}
    assert produced & specials == ends
    assert len(produced) > 200
    for completion in completions:
        assert ends.isdisjoint(completion.token_ids[:-1])
        assert (completion.token_ids[-1] in ends) == (completion.finish_reason == "stop")


def test_logprobs_are_those_of_the_model_without_penalty_and_temperature(tiny):
    options = dataclasses.replace(SAMPLED, repetition_penalty=1.5, temperature=0.6)
    (completion,) = tiny.generator().generate(["x = "], options)
    ids = [254, *b"x = ", *completion.token_ids]
    logprobs = jax.nn.log_softmax(np.asarray(tiny.scores(ids)), axis=-1)
    expected = [float(logprobs[4 + i, token]) for i, token in enumerate(completion.token_ids)]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_the_penalty_covers_prompt_and_completion(tiny):
    options = dataclasses.replace(GREEDY, repetition_penalty=1e6, max_tokens=40)
    (completion,) = tiny.generator().generate(["repeat"], options)
    assert len(completion.token_ids) > 10
    assert len({*completion.token_ids, *b"repeat"}) == len(completion.token_ids) + len(set(b"repeat"))


def test_ids_are_a_prompt_too(tiny):
    generator = tiny.generator()
    (from_text,) = generator.generate(["abc"], GREEDY)
    (from_ids,) = generator.generate([[254, *b"abc"]], GREEDY)
    assert from_ids == dataclasses.replace(from_text, tokens_per_second=from_ids.tokens_per_second)
    with pytest.raises(UserError, match="300"):
        generator.generate([[300]], GREEDY)
    with pytest.raises(UserError, match="no tokens"):
        generator.generate([[]], GREEDY)
    assert generator.generate([], GREEDY) == []


def test_user_text_cannot_spell_specials(tiny):
    (completion,) = tiny.generator().generate(["</s>"], GREEDY)
    assert completion.prompt_tokens == 5


def test_a_prompt_beyond_the_context_is_refused_or_cut_as_asked(tiny):
    long = "0123456789" * 12
    with pytest.raises(UserError, match=r"121 tokens and max_tokens=12 .* context is 96"):
        tiny.generator().generate([long], GREEDY)
    (cut,) = tiny.generator().generate([long], dataclasses.replace(GREEDY, truncate_prompt=True))
    (end,) = tiny.generator().generate([list(long.encode()[-84:])], GREEDY)
    assert (cut.prompt_tokens, cut.dropped_prompt_tokens) == (84, 37)
    assert cut.token_ids == end.token_ids
    with pytest.raises(UserError, match="context is 96"):
        tiny.generator().generate(["a"], SamplingOptions(max_tokens=96, truncate_prompt=True))


def test_the_whole_context_can_be_used(make_tiny):
    learned = make_tiny(**GPT2)
    options = dataclasses.replace(GREEDY, max_tokens=95)
    (completion,) = learned.generator().generate([""], options)
    assert completion.token_ids == expected_greedy(learned, "", 95)


def test_a_stream_is_the_completion_in_pieces_of_whole_characters(tiny):
    options = dataclasses.replace(SAMPLED, max_tokens=60, stop=("zz",))
    (completion,) = tiny.generator().generate(["é"], options)
    pieces, end = [], []

    def follow():
        end.append((yield from tiny.generator().stream("é", options)))

    pieces.extend(follow())
    assert "".join(pieces) == completion.text
    assert end[0].token_ids == completion.token_ids
    assert all(pieces)
    assert len(pieces) > 10
    with pytest.raises(UserError, match="num_samples=2"):
        next(tiny.generator().stream("é", dataclasses.replace(options, num_samples=2)))


def test_multi_byte_characters_stream_whole(make_tiny):
    """A model made to spell one emoji over and over: each byte's successor by its embedding."""
    tiny = make_tiny(embeddings="untied")
    emoji = "😀".encode()
    kernel = np.zeros((64, 256), np.float32)
    embedding = np.zeros((256, 64), np.float32)
    for i, value in enumerate(emoji):
        embedding[value, i] = 100.0
        kernel[i, emoji[(i + 1) % 4]] = 100.0
    params = {**tiny.params, "embed": {"embedding": embedding}, "unembed": {"kernel": kernel}}
    options = dataclasses.replace(GREEDY, max_tokens=10)
    pieces = list(tiny.generator(params=params).stream([254, emoji[3]], options))
    assert pieces == ["😀", "😀", "\ufffd"]


def test_parameters_split_over_a_mesh_give_the_same_text_without_hidden_transfers(tiny, caplog):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), tiny.model, batch_size=4)
    generator = tiny.generator(params=jax.device_put(tiny.params, params_sharding(mesh, tiny.params, RULES)))
    with compilations(caplog) as compiled, jax.transfer_guard("disallow"):
        completions = generator.generate(["a", "import"], SAMPLED)
    assert [c.token_ids for c in completions] == [
        c.token_ids for c in tiny.generator().generate(["a", "import"], SAMPLED)
    ]
    assert sorted(compiled) == ["decode", "prefill"]


def test_scores_that_are_not_finite_are_an_error(tiny):
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), tiny.params)
    with pytest.raises(UserError, match="not finite"):
        tiny.generator(params=broken).generate(["a"], SAMPLED)


def test_a_tokenizer_larger_than_the_model_is_refused(make_tiny):
    with pytest.raises(UserError, match="256 entries"):
        make_tiny(vocab_size=128).generator()


def test_a_vocabulary_wider_than_the_tokenizer_is_not_used(make_tiny):
    wide = make_tiny(vocab_size=512)
    options = SamplingOptions(max_tokens=60, temperature=3.0, top_k=0, top_p=1.0, num_samples=8)
    for completion in wide.generator().generate([""], options):
        assert max(completion.token_ids) < 256

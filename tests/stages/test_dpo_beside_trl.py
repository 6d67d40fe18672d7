"""DPO beside TRL, which is written by others: from texts to the loss, with a model and its reference as exports."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from smallcoder_jax.config import DpoConfig
from smallcoder_jax.data.preferences.pair import Preference
from smallcoder_jax.data.rows.pairs import encode_pairs, fill_pairs
from smallcoder_jax.huggingface.write import write_export
from smallcoder_jax.models import build
from smallcoder_jax.stages import dpo
from smallcoder_jax.stages.shared.pairs import by_pair, hidden_states
from smallcoder_jax.tokenizers.sentencepiece import train_sentencepiece
from tests.helpers import FLOAT32, tiny_config
from tests.huggingface.conftest import CODE, llama, random_params

PAIRS = [
    Preference(f"def f{i}(x):\n", f"    return x + {i}\n" + "    # more\n" * (i % 3), f"    return {i}\n", "name")
    for i in range(6)
]
BETA = 0.3


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore")  # TRL and what it imports
def test_loss_margin_and_accuracy_are_those_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_sentencepiece([CODE] * 4, 420, 100_000)
    model = llama(head_size=16)
    policy, reference = random_params(model, 0), random_params(model, 7)
    for name, params in (("policy", policy), ("reference", reference)):
        write_export(tmp_path / name, model=model, params=params, tokenizer=tokenizer, card={"name": name})
    theirs = _loss_of_trl(tmp_path, monkeypatch)

    graph, _ = build.abstract_model(model, FLOAT32)
    pairs = encode_pairs(PAIRS, tokenizer)
    filled = fill_pairs([pairs[:2], pairs[2:]], 3, 160, 4, tokenizer.pad_id)
    batch = {name: jnp.asarray(value) for name, value in filled.items()}
    batch["criterion"] = jnp.zeros((3, 4, 1), jnp.int32)
    begun = build.bind(graph, reference)
    before = by_pair(dpo.answer_log_probs(begun, hidden_states(begun, batch, None), batch))
    batch["reference"] = jnp.stack(before, axis=-1).reshape(3, 4, 2)
    config = dataclasses.replace(tiny_config(model=model, compute=FLOAT32), dpo=DpoConfig(beta=BETA))
    loss, weight, sums = jax.device_get(dpo.make_loss(config, ("name",))({"model": policy}, batch, None))
    assert weight == len(PAIRS)
    ours = {name: value / weight for name, value in {"loss": loss, **sums}.items()}
    assert abs(theirs["margin"]) > 0.1
    for name in ("loss", "margin", "accuracy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def _loss_of_trl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    import transformers
    import trl

    model, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32")
        for name in ("policy", "reference")
    )
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in PAIRS]
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(folder / "trl"), beta=BETA, use_cpu=True, bf16=False, report_to="none", max_length=None
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "policy"),
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    measured = trainer._metrics["eval"]
    return {
        "loss": float(loss),
        "margin": measured["rewards/margins"][-1],
        "accuracy": measured["rewards/accuracies"][-1],
    }

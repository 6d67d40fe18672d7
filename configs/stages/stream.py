"""Stage stream: one document per step, in the order of the stream. SlimPajama; nano: the prose of this machine.

Command:   python -m smallcoder_jax.main --config=configs/stages/stream.py:small --workdir=runs/stream
Presets:   after a comma, as in :small,test. test, development and production (the default) take 100, 1000 and 10,000
           steps.
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      not measured.
Expected:  the loss starts at ln(vocabulary) and falls. With one document per step it is noisy; the evaluations are not.

A row is the first 256 tokens of a document. Documents are streamed once, filtered and kept under data/: twice as many
as there are steps, so that every step has a new one. 1000 unusable documents in a row end the run. Without a network:
--config.data.sources=prose!nofim, or dir:/my/text.
"""

from pathlib import Path

from ml_collections import ConfigDict

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import nearest
from smallcoder_jax.configfile import read_config_file

# Steps, and steps between evaluations.
PRESETS = {"test": (100, 50), "development": (1000, 200), "production": (10_000, 1000)}


def get_config(argument: str = "small,production") -> ConfigDict:
    variant, _, preset = argument.partition(",")
    preset = preset or "production"
    if preset not in PRESETS:
        raise UserError(
            f"configs/stages/stream.py:{argument}: there is no preset '{preset}'; {nearest(preset, [*PRESETS])}"
        )
    steps, every = PRESETS[preset]
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-stream"
    config.data.update(
        sources="hf:cerebras/SlimPajama-627B!nofim",
        packing="document",
        fim_rate=0.0,
        repository_order=False,
        max_documents=2 * steps,
    )
    config.train.update(steps=steps, batch_size=1, sequence_length=256, microbatch_size=0)
    config.optimizer.update(name="adamw", learning_rate=1e-3, schedule="constant", warmup_steps=min(1000, steps // 10))
    config.eval.update(every=every, batches=8, batch_size=8, sample_prompts=("The ", "In the beginning"))
    config.checkpoint.update(every=every)
    config.log.update(charts_every=every)
    if variant == "nano":
        config.data.sources = "prose!nofim"
    return config

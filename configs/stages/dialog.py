r"""Stage dialog: questions and answers (Alpaca-GPT4), with the loss on the answer and its end only.

Command:   python -m smallcoder_jax.main --config=configs/stages/dialog.py:small --workdir=runs/dialog \
             --config.stage.start=runs/language
Presets:   after a comma, as in :small,test. test and development use the first 100 and 1000 conversations, production
           (the default) all 52,002 that are published.
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      not measured.
Expected:  answers that end (`ended` of --mode=evaluate); the loss on held-out answers falls.

A row is one conversation, so that the number of steps follows from that of epochs: 1 for test, 2 for development and 3
for production. Without a network: --config.dialogs.source=jsonl:PATH (or parquet:PATH), with rows in one of the formats
of docs/data.md.
"""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from smallcoder_jax.base.errors import UserError
from smallcoder_jax.config import nearest
from smallcoder_jax.configfile import read_config_file

PUBLISHED = 52_002  # conversations of vicgalle/alpaca-gpt4
HELD_OUT = 0.1


class Preset(NamedTuple):
    batch_size: int
    samples: int  # 0: all
    evaluate_every: int
    learning_rate: float
    epochs: int


PRESETS = {
    "test": Preset(2, 100, 50, 5e-5, 1),
    "development": Preset(4, 1000, 200, 3e-5, 2),
    "production": Preset(8, 0, 1000, 2e-5, 3),
}


def get_config(argument: str = "small,production") -> ConfigDict:
    variant, _, name = argument.partition(",")
    name = name or "production"
    if name not in PRESETS:
        raise UserError(
            f"configs/stages/dialog.py:{argument}: there is no preset '{name}'; {nearest(name, [*PRESETS])}"
        )
    preset = PRESETS[name]
    steps = round((preset.samples or PUBLISHED) * (1 - HELD_OUT) * preset.epochs / preset.batch_size)
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-dialog"
    config.stage.name = "sft"
    config.dialogs.update(source="hf:vicgalle/alpaca-gpt4", count=preset.samples, packed=False)
    length = min(1024, config.model.context)
    config.train.update(steps=steps, batch_size=preset.batch_size, sequence_length=length, microbatch_size=0)
    config.optimizer.update(
        name="adamw", learning_rate=preset.learning_rate, schedule="cosine", warmup_steps=min(100, steps // 10)
    )
    config.eval.update(every=preset.evaluate_every, batches=16, batch_size=preset.batch_size)
    config.checkpoint.update(every=preset.evaluate_every)
    config.log.update(charts_every=preset.evaluate_every)
    return config

r"""Stage grpo: compares the answers to one question with each other; their rewards come from running them.

Command:   python -m smallcoder_jax.main --config=configs/stages/grpo.py:small --workdir=runs/grpo \
             --config.stage.start=runs/tools
           or as part of a pipeline: python -m tools.run_stages --variant=small
Hardware:  that of the variant (configs/small.py); nano: two CPU cores.
Time:      measured for nano only (docs/benchmarks.md, "make pipeline").
Expected:  the mean reward of answers to held-out prompts rises, and the divergence from the start model stays small.
"""

from pathlib import Path

from ml_collections import ConfigDict

from smallcoder_jax.configfile import read_config_file


def get_config(variant: str = "small") -> ConfigDict:
    config = read_config_file(str(Path(__file__).parents[1] / f"{variant}.py"))
    config.name += "-grpo"
    config.stage.name = "grpo"
    # start_kl: nats per answer from the start model. If it rises along with the reward, the model exploits the reward.
    config.stage.measures = ("reward higher error=gain_error", "start_kl <=4")
    config.rl.update(questions=8, group_size=8)
    config.train.update(steps=1000, batch_size=16, sequence_length=min(1024, config.model.context), microbatch_size=0)
    config.optimizer.update(name="adamw", learning_rate=1e-6, warmup_steps=100, clip_norm=0.5, schedule="linear")
    config.eval.update(batches=4, every=100)
    if variant == "nano":
        # Rewards did not rise at lower temperatures, and rose little with fewer answers and two epochs (docs/LOG.md).
        config.rl.update(
            prompt_count=2000,
            questions=8,
            group_size=8,
            inner_epochs=1,
            answer_tokens=96,
            temperature=1.3,
            eval_answers=2,
        )
        config.train.update(steps=32, batch_size=32, sequence_length=240, microbatch_size=4, log_every=4)
        config.optimizer.update(learning_rate=1.7e-4, warmup_steps=4, weight_decay=0.0)
        config.eval.update(every=32, batches=0, batch_size=32)
        config.checkpoint.update(every=16)
    return config

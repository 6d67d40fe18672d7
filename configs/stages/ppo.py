r"""Stage ppo: maximises the reward model's score of answers, with a penalty for diverging from the start model.

Command:   python -m smallcoder_jax.main --config=configs/stages/ppo.py:small --workdir=runs/ppo \
             --config.stage.start=runs/tools --config.rl.reward_model=runs/reward
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
    config.name += "-ppo"
    config.stage.name = "ppo"
    # start_kl: nats per answer from the start model. If it rises along with the reward, the model exploits the reward.
    config.stage.measures = ("reward higher error=gain_error", "start_kl <=4")
    config.rl.update(questions=16, group_size=4)
    config.train.update(steps=1000, batch_size=16, sequence_length=min(1024, config.model.context), microbatch_size=0)
    config.optimizer.update(name="adamw", learning_rate=1e-6, warmup_steps=100, clip_norm=0.5, schedule="linear")
    config.eval.update(batches=4, every=100)
    if variant == "nano":
        # value_weight: the critic's gradient must not dominate clip_norm. value_clip: values have to move by more than
        # 0.2 in an iteration. value_warmup: untrained values mislead the policy. gamma: without a discount the first
        # tokens of an answer get their share of its reward (docs/LOG.md).
        config.rl.update(
            prompt_count=2000,
            questions=16,
            group_size=4,
            inner_epochs=1,
            answer_tokens=64,
            temperature=1.0,
            eval_answers=4,
            value_weight=0.02,
            value_clip=100.0,
            value_warmup=2,
            entropy_weight=0.0,
            gamma=1.0,
        )
        config.train.update(steps=48, batch_size=32, sequence_length=192, microbatch_size=4, log_every=4)
        config.optimizer.update(learning_rate=1.3e-4, warmup_steps=4, weight_decay=0.0)
        config.eval.update(every=48, batches=0, batch_size=32)
        config.checkpoint.update(every=24)
    return config

"""Names of settings in TRL, transformers, verl and OpenRLHF, and the settings here that
do the same; settings as Python names them.
"""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterator

from jaxppo.config import RunConfig
from jaxppo.errors import RunError

# A name in each library, and the settings here; with `=` it is a certain value that
# does the same (`name:VALUE` of `loss_settings`). Settings with the same name and
# meaning are left out.
LIBRARIES: dict[str, dict[str, str]] = {
    "TRL": {
        "adap_kl_ctrl": "kl_adaptive",
        "beta": "kl_coef",  # of GRPO; beta here is the weight of a loss
        "cliprange": "clip_low clip_high",
        "cliprange_value": "value_clip",
        "dataset_name": "data",
        "delta": "loss=dual_clip loss_settings=ceiling:DELTA",
        "epsilon": "clip_low clip_high",
        "epsilon_high": "clip_high",
        "horizon": "kl_horizon",
        "importance_sampling_level": "loss=gspo",
        "init_kl_coef": "kl_coef",
        "kl_estimator": "kl",
        "kl_penalty": "kl",
        "log_completions": "log_samples",
        "log_with": "track",
        "lora_r": "lora",
        "lora_target_modules": "lora_on",
        "loss_type": "aggregate",
        "max_completion_length": "response_length",
        "max_prompt_length": "prompt_length",
        "mini_batch_size": "minibatches",
        "model_name": "model",
        "model_name_or_path": "model",
        "normalize_advantages": "whiten_advantages",
        "normalize_reward": "reward_norm",
        "num_completions_to_print": "log_samples",
        "num_generations": "group_size",
        "num_generations_eval": "eval_samples",
        "num_iterations": "epochs",
        "num_mini_batches": "minibatches",
        "num_ppo_epochs": "epochs",
        "num_sample_generations": "log_samples",
        "off_policy_mask_threshold": "off_policy_threshold",
        "ppo_epochs": "epochs",
        "query_dataset": "data",
        "ref_model_sync_steps": "reference_every",
        "reward_clip_range": "reward_clip",
        "reward_func": "reward",
        "reward_funcs": "reward",
        "reward_model_name_or_path": "reward_model",
        "reward_model_path": "reward_model",
        "reward_weights": "weights",
        "rloo_k": "group_size",
        "scale_rewards": "advantage",
        "score_clip": "reward_clip",
        "sft_model_path": "model",
        "steps_per_generation": "minibatches microbatches",
        "stop_sequences": "stop",
        "stop_strings": "stop",
        "stop_token": "stop",
        "target": "kl_target",
        "target_kl": "kl_stop",
        "teacher_model_name_or_path": "teacher",
        "top_entropy_quantile": "top_entropy",
        "total_episodes": "steps",
        "use_peft": "lora",
        "use_rslora": "rslora",
        "use_score_norm": "reward_norm",
        "use_score_scaling": "reward_norm",
        "vf_coef": "value_coef",
        "vllm_importance_sampling_clip_max": "correction_high",
        "vllm_importance_sampling_clip_min": "correction_low",
        "vllm_importance_sampling_mode": "correction",
    },
    "transformers": {
        "adam_epsilon": "adam_eps",
        "bf16": "dtype=bfloat16",
        "eval_steps": "eval_every",
        "fp16": "dtype=bfloat16",
        "gradient_accumulation_steps": "microbatches",
        "gradient_checkpointing": "remat=block",
        "learning_rate": "lr",
        "logging_dir": "runs",
        "lr_scheduler_type": "lr_schedule",
        "max_length": "response_length",
        "max_new_tokens": "response_length",
        "max_steps": "steps",
        "max_tokens": "response_length",
        "min_length": "min_tokens",
        "min_new_tokens": "min_tokens",
        "num_train_epochs": "steps",
        "num_train_steps": "steps",
        "optim": "optimizer",
        "output_dir": "runs name",
        "per_device_train_batch_size": "batch_size",
        "report_to": "track",
        "resume_from_checkpoint": "resume",
        "run_name": "name",
        "save_steps": "save_every",
        "torch_dtype": "dtype",
        "warmup_ratio": "lr_warmup",
        "warmup_steps": "lr_warmup",
    },
    "verl": {
        "actor_rollout_ref.actor.clip_ratio": "clip_low clip_high",
        "actor_rollout_ref.actor.clip_ratio_c": "loss=dual_clip loss_settings=ceiling:CLIP_RATIO_C",
        "actor_rollout_ref.actor.clip_ratio_high": "clip_high",
        "actor_rollout_ref.actor.clip_ratio_low": "clip_low",
        "actor_rollout_ref.actor.entropy_coeff": "entropy_coef",
        "actor_rollout_ref.actor.grad_clip": "max_grad_norm",
        "actor_rollout_ref.actor.kl_loss_coef": "kl_coef",
        "actor_rollout_ref.actor.kl_loss_type": "kl",
        "actor_rollout_ref.actor.loss_agg_mode": "aggregate",
        "actor_rollout_ref.actor.optim.lr": "lr",
        "actor_rollout_ref.actor.optim.lr_warmup_steps": "lr_warmup",
        "actor_rollout_ref.actor.policy_loss.loss_mode": "loss",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "microbatches",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "minibatches",
        "actor_rollout_ref.actor.use_kl_loss": "kl_place=loss",
        "actor_rollout_ref.model.enable_gradient_checkpointing": "remat=block",
        "actor_rollout_ref.model.lora_rank": "lora",
        "actor_rollout_ref.model.path": "model",
        "actor_rollout_ref.model.target_modules": "lora_on",
        "actor_rollout_ref.rollout.n": "group_size",
        "actor_rollout_ref.rollout.val_kwargs.n": "eval_samples",
        "algorithm.adv_estimator": "advantage",
        "algorithm.filter_groups.enable": "filter_groups",
        "algorithm.kl_ctrl.horizon": "kl_horizon",
        "algorithm.kl_ctrl.kl_coef": "kl_coef",
        "algorithm.kl_ctrl.target_kl": "kl_target",
        "algorithm.kl_ctrl.type": "kl_adaptive",
        "algorithm.norm_adv_by_std_in_grpo": "advantage",
        "algorithm.rollout_correction.rollout_is": "correction",
        "algorithm.rollout_correction.rollout_is_threshold": "correction_high",
        "algorithm.rollout_correction.rollout_rs": "rejection",
        "algorithm.rollout_correction.rollout_rs_threshold": "rejection_high",
        "algorithm.use_kl_in_reward": "kl_place=reward",
        "critic.cliprange_value": "value_clip",
        "critic.optim.lr": "critic_lr",
        "custom_reward_function.path": "reward",
        "data.max_response_length": "response_length",
        "data.train_batch_size": "batch_size",
        "data.train_files": "data",
        "reward_model.model.path": "reward_model",
        "trainer.default_local_dir": "runs",
        "trainer.experiment_name": "name",
        "trainer.logger": "track",
        "trainer.resume_mode": "resume",
        "trainer.save_freq": "save_every",
        "trainer.test_freq": "eval_every",
        "trainer.total_epochs": "steps",
        "trainer.total_training_steps": "steps",
    },
    "OpenRLHF": {
        "actor_learning_rate": "lr",
        "advantage_estimator": "advantage",
        "critic_learning_rate": "critic_lr",
        "dynamic_filtering": "filter_groups",
        "eps_clip": "clip_low clip_high",
        "freezing_actor_steps": "critic_warmup",
        "generate_max_len": "response_length",
        "lambd": "lam",
        "max_epochs": "epochs",
        "micro_train_batch_size": "microbatches",
        "n_samples_per_prompt": "group_size",
        "num_episodes": "steps",
        "pretrain": "model",
        "prompt_data": "data",
        "prompt_max_len": "prompt_length",
        "remote_rm_url": "reward",
        "rollout_batch_size": "batch_size",
        "save_path": "runs name",
        "use_tensorboard": "track=tensorboard",
        "use_wandb": "track=wandb",
    },
    "other libraries": {
        "clip_coef": "clip_low clip_high",
        "clip_range": "clip_low clip_high",
        "ent_coef": "entropy_coef",
        "gae_lambda": "lam",
        "gradient_clipping": "max_grad_norm",
        "tensorboard": "track=tensorboard",
        "wandb": "track=wandb",
    },
}
ELSEWHERE = {name: here for table in LIBRARIES.values() for name, here in table.items()}

# Settings here that count something else than their counterparts elsewhere.
NOTES = {
    "batch_size": "rollouts a step over all devices: prompts x group_size",
    "minibatches": "their number, not their size",
    "microbatches": "the parts of a minibatch: their number, not their size",
    "steps": "rollouts of a whole batch, each with its updates",
    "lora": "the rank; 0 = train all weights",
    "advantage": "group divides by the deviation of a group, group_mean does not",
}


def settings_for(name: str) -> list[str]:
    """The settings here that do what `name` does elsewhere, with a value after `=`;
    none if it is unknown.

    >>> settings_for("cliprange"), settings_for("bf16")
    (['clip_low', 'clip_high'], ['dtype=bfloat16'])
    >>> settings_for("actor_rollout_ref.rollout.n"), settings_for("adv_estimator")
    (['group_size'], ['advantage'])
    """
    last = name.rpartition(".")[2]
    for key in (name, last):
        clear = "." in key or "_" in key  # optim.lr, adv_estimator; lr alone says too little
        ends = [here for known, here in ELSEWHERE.items() if clear and known.endswith(f".{key}")]
        if found := [ELSEWHERE[key]] if key in ELSEWHERE else ends:
            return found[0].split()
    return []


def suggest(name: str, names: Collection[str], *, show: Callable[[str], str] = str) -> str:
    """Words about what a wrong name of a setting could mean, or "".

    Args:
      name: with or without dashes, such as `num_generations` or `--num-generations`.
      names: the settings that there are.
      show: writes a setting, or `setting=value`, in the user's form.

    >>> suggest("num_generations", ["group_size", "lr"])
    'here it is group_size'
    >>> suggest("lrr", ["group_size", "lr"]), suggest("xyz", ["group_size", "lr"])
    ('perhaps you meant lr', '')
    """
    plain = name.strip().lstrip("-").replace("-", "_").lower()
    last, known = plain.rpartition(".")[2], settings_for(plain)
    if "." in plain and not known:
        known = [last]
    if known and _all_in(known, names):
        note = f" ({NOTES[known[0]]})" if known[0] in NOTES else ""
        return f"here it is {' and '.join(show(x) for x in known)}{note}"
    near = lambda among, cutoff: difflib.get_close_matches(last, among, n=1, cutoff=cutoff)
    elsewhere = sorted(name for name in ELSEWHERE if _all_in(settings_for(name), names))
    found = near(sorted(names), 0.8) or [x for y in near(elsewhere, 0.8) for x in settings_for(y)]
    found = found or near(sorted(names), 0.8 if known else 0.6)
    return f"perhaps you meant {' and '.join(show(x) for x in found)}" if found else ""


def as_keywords(text: str, switches: Collection[str], names: Collection[str]) -> str:
    """Write the options in a text as keyword arguments of Python.

    Args:
      switches: the settings that are on or off.
      names: all settings; other options stay.

    >>> as_keywords("--batch-size 64, --resume and --dpo", ["resume"], ["batch_size"])
    'batch_size=64, resume=True and --dpo'
    """

    def keyword(found: re.Match) -> str:
        name, number = found[1].replace("-", "_"), found[2]
        if name in switches:
            return f"{name}=True"
        if name.removeprefix("no_") in switches:
            return f"{name.removeprefix('no_')}=False"
        if name not in names:
            return found[0]
        return name + (f"={number}" if number else "")

    return re.sub(r"(?<![\w-])--([a-z][a-z0-9-]*)(?: (-?\d[\d.e-]*\b))?", keyword, text)


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    """Name settings in errors as keyword arguments, not as options: for functions that
    are called from Python."""
    try:
        yield
    except RunError as error:
        fields = dataclasses.fields(RunConfig)
        switches = [field.name for field in fields if isinstance(field.default, bool)]
        names = [*(field.name for field in fields), "checkpoint"]
        error.args = (as_keywords(str(error), switches, names),)
        raise


def _all_in(settings: list[str], names: Collection[str]) -> bool:
    return all(setting.partition("=")[0] in names for setting in settings)

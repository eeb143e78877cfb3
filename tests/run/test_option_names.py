import dataclasses

import pytest

from jaxppo.config import RunConfig
from jaxppo.run.option_names import ELSEWHERE, LIBRARIES, NOTES, settings_for, suggest
from jaxppo.tasks import TaskConfig

RUN = {field.name for field in dataclasses.fields(RunConfig)}
# also the options of a task and the arguments of `train.policy`
ALL = RUN | {field.name for field in dataclasses.fields(TaskConfig)} | {"reward", "weights"}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_setting_in_the_table_exists(name):
    found = [setting.partition("=")[0] for setting in settings_for(name)]
    assert found and set(found) <= ALL


@pytest.mark.parametrize("name", [name for name, here in ELSEWHERE.items() if "=" in here])
def test_a_value_in_the_table_is_valid(name):
    for setting in settings_for(name):
        key, _, value = setting.partition("=")
        kind = {"dtype", "loss", "remat", "kl_place", "track", "loss_settings"}
        assert key in kind and value.partition(":")[0] in {
            "bfloat16", "gspo", "dual_clip", "block", "loss", "reward", "tensorboard", "wandb",
            "ceiling",
        }  # fmt: skip


def test_a_name_is_of_one_library_and_not_ours():
    assert sum(map(len, LIBRARIES.values())) == len(ELSEWHERE)
    # TRL's beta is the weight of the KL, ours that of a loss
    assert RUN & set(ELSEWHERE) == {"beta"}


def test_notes_are_about_settings():
    assert set(NOTES) <= RUN


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("--num-generations", "here it is group_size"),
        ("num_train_steps", "here it is steps (rollouts of a whole batch, each with its updates)"),
        ("Learning_Rate", "here it is lr"),
        ("epsilon", "here it is clip_low and clip_high"),
        ("delta", "here it is loss=dual_clip and loss_settings=ceiling:DELTA"),
        ("bf16", "here it is dtype=bfloat16"),
        ("actor_rollout_ref.rollout.n", "here it is group_size"),
        ("rollout.n", "here it is group_size"),
        ("critic.optim.lr", "here it is critic_lr"),
        ("clip_ratio_high", "here it is clip_high"),
        ("algorithm.gamma", "here it is gamma"),
        # by letters, of our names and of those elsewhere
        ("stepz", "perhaps you meant steps"),
        ("num_generation", "perhaps you meant group_size"),
        ("batch-size", "perhaps you meant batch_size"),
        ("reward_weights", ""),  # a run has none; reward_reference is not near enough
        ("quux", ""),
        ("n", ""),
        ("", ""),
    ],
)
def test_suggestions(name, here):
    assert suggest(name, RUN) == here


def test_only_settings_that_there_are_are_suggested():
    assert suggest("dataset_name", RUN) == ""
    assert suggest("dataset_name", ALL) == "here it is data"
    assert suggest("max_new_tokens", {"max_tokens"}) == "perhaps you meant max_tokens"


def test_a_suggestion_is_written_as_the_user_writes_it():
    assert suggest("epsilon", RUN, show=str.upper) == "here it is CLIP_LOW and CLIP_HIGH"

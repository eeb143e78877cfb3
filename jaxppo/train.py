"""Train from Python: `policy` for your own prompts and reward or environment, `fit` for
everything else. `open_run` opens a run that exists.

    run = train.policy(prompts, reward, model="smollm2", algorithm="grpo", steps=50)
    run.metrics["reward"], run.sample(["..."]), run.export("exported")
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from jaxppo import algorithms
from jaxppo.config import RunConfig
from jaxppo.data import prompts as encoding
from jaxppo.data import table
from jaxppo.data.prompts import BatchSource
from jaxppo.decoding.turns import check_environment
from jaxppo.environments.text import Game
from jaxppo.errors import Diverged, UserError
from jaxppo.parallel import processes
from jaxppo.rewards import function, in_program
from jaxppo.run import episodes, figures, files, load, loop, profiling, replay, resume, start
from jaxppo.run.episodes import World
from jaxppo.run.lock import RunLock
from jaxppo.run.log import Log
from jaxppo.run.opened import Run
from jaxppo.run.option_names import in_python, suggest
from jaxppo.run.policy import Policy, check_fits
from jaxppo.run.settings import checked_settings, to_dict
from jaxppo.run.teacher import with_teacher
from jaxppo.run.validation import make_reward_validation
from jaxppo.supervised import Objective
from jaxppo.types import Environment, Parts, TrainState

INSTANCES = 4096  # of a game that is trained on without prompts


def fit(
    config: RunConfig,
    policy: Policy,
    parts: Parts | Objective,
    prompts: BatchSource,
    *,
    folder: Path,
    evaluate: loop.Evaluate | None = None,
) -> TrainState:
    """Train to `config.steps`, from the newest checkpoint if `config.resume`, and write
    metrics, checkpoints and curves.

    Args:
      parts: of a policy gradient, with a `PromptSet`; or the objective of a supervised
        stage, with `data.rows.Rows`.
      folder: of the run. Of several processes, the first writes.
      evaluate: returns metrics on validation prompts, logged as `validation_<name>`.
        The best checkpoint is chosen by `score` among them; without `evaluate`, by the
        batch's reward or loss.

    Raises:
      UserError: the settings, the devices or the folder do not fit. See also
        `loop.run`.
    """
    if config.teacher and isinstance(parts, Parts):
        policy, parts = with_teacher(config, policy, parts, prompts)
    step = start.build_step(config, policy, parts)
    state = start.untrained_state(config, policy, step)
    # The first step deletes the state, and a replay needs its shapes.
    like = jax.eval_shape(lambda: state.replace(frozen=None, key=None))
    like = like.replace(frozen=state.frozen, key=jax.random.key(config.seed))
    writer = processes.is_main()
    with contextlib.ExitStack() as stack:
        if writer:
            stack.callback(RunLock(folder).release)
        checkpoints = start.open_checkpoints(config, folder, prompts, write=writer)
        stack.callback(checkpoints.close)
        past = []
        resuming = config.resume and not resume.not_started(folder, checkpoints)
        if resuming:
            data = checkpoints.about["data"]
            state = resume.restore_newest(config, checkpoints, state, folder, data=data)
            if evaluate is not None:
                resume.finish_evaluation(config, checkpoints, state, folder, evaluate)
            past = [row for row in files.read_metrics(folder) if row["step"] <= int(state.step)]
        else:
            state = start.initial_state(config, policy, parts, prompts, state)
        if writer:
            files.write_config(folder, to_dict(config))
            files.write_command(folder)
        if not resuming:
            checkpoints.save(state, score=None)  # from here on, the run can be resumed
        first = int(state.step)
        log = start.open_log(config, policy, parts, folder, first_step=first) if writer else Log()
        stack.callback(log.close)
        meter = start.make_meter(config, policy, parts, step)
        trace = profiling.Trace(config, folder)
        stack.callback(meter.close)
        stack.callback(trace.close)
        try:
            return loop.run(
                config,
                step,
                state,
                prompts,
                log=log,
                checkpoints=checkpoints,
                evaluate=evaluate,
                meter=meter,
                trace=trace,
                past=past,
            )
        except loop.NonFiniteUpdate as error:
            (number,) = error.args
            text = replay.diagnose(config, policy, parts, prompts, checkpoints, like, step=number)
            raise Diverged(text) from None
        except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
            raise start.explain(error, config, checkpoints) from error
        finally:
            # a failure to draw must not hide why the run ends
            with contextlib.suppress(OSError):
                if writer and (folder / "metrics.jsonl").stat().st_size:
                    figures.plot_curves(folder)


@in_python()
def policy(
    prompts: Any = None,
    reward: Callable | Mapping[str, Callable] | None = None,
    *,
    environment: World | None = None,
    weights: Mapping[str, float] | None = None,
    validation: Any = None,
    parts: Callable[[Parts], Parts] = lambda parts: parts,
    too_long: Literal["drop", "last", "error"] = "drop",
    **settings: Any,
) -> Run:
    """Train a language model on your prompts with your reward, or in an environment.
    Returns the run.

    Args:
      prompts: texts, chats, dicts with further columns, a `datasets.Dataset`, or the
        path of a .jsonl file (`data.table.read_columns`). None: instances of a game.
      reward: `reward(prompt, response, **columns) -> float` or a dict of named floats;
        or all rows at once, `rewards(prompts, responses, **columns)`; or functions by
        name (`rewards.function.from_user`). None: the reward model of `reward_model`;
        the sum of the environment's rewards; or a `teacher` alone.
      environment: answers what the policy writes: a `types.Environment` on tokens, or a
        text environment or a game (`environments.text`). It starts from the columns of
        numbers and arrays, by name, and decides `response_length`.
      weights: of named scores; 1 by default.
      validation: held-out prompts, of the same form. Their reward chooses the best
        checkpoint; without them, the training reward does.
      parts: replaces parts of the algorithm, such as
        `lambda parts: parts._replace(policy_loss=my_loss)`.
      too_long: what happens to prompts of more than `prompt_length` tokens.
      settings: fields of `config.RunConfig`, such as model, algorithm, steps, lora, lr,
        response_length, seed, name. By default `dtype` is bfloat16 and `prompt_length`
        that of the longest prompt. The run's folder is runs/<name>; if there is one,
        the next free number is added to the name, unless `resume=True` continues it.

    Raises UserError for wrong settings, prompts or rewards.
    """
    known = {field.name for field in dataclasses.fields(RunConfig)}
    if unknown := [name for name in settings if name not in known]:
        hint = suggest(unknown[0], known)
        raise UserError(f"train.policy has no setting {unknown[0]!r}" + f"; {hint}" * bool(hint))
    defaults = {"name": "policy", "prompt_length": 0, "dtype": "bfloat16"}
    if environment is not None:
        defaults["response_length"] = episodes.response_length(environment)
    config = RunConfig(**defaults | checked_settings(RunConfig, settings, source="train.policy"))
    if not config.resume:
        config = dataclasses.replace(config, name=files.free_name(config.runs, config.name))
    return train_on(
        config,
        prompts,
        reward,
        environment=environment,
        weights=weights,
        validation=validation,
        parts=parts,
        too_long=too_long,
    )


def train_on(
    config: RunConfig,
    prompts: Any,
    reward: Callable | Mapping[str, Callable] | None,
    *,
    environment: World | None = None,
    weights: Mapping[str, float] | None = None,
    validation: Any = None,
    parts: Callable[[Parts], Parts] = lambda parts: parts,
    too_long: Literal["drop", "last", "error"] = "drop",
) -> Run:
    """`policy` with whole settings; `prompt_length` 0 is that of the longest prompt."""
    if config.eval_samples > 1 and validation is None:
        raise UserError(f"--eval-samples {config.eval_samples} needs validation prompts")
    if config.prompt_format != RunConfig.prompt_format:
        raise UserError("--prompt-format: prompts are read as they are; write them in this format")
    if weights and reward is None:
        raise UserError("weights are of the named scores of a reward function; there is none")
    if reward is not None and config.reward_model and config.value_init != "reward":
        raise UserError(
            f"there is a reward function and --reward-model {config.reward_model}; give one of "
            "them, or start the critic from the model with --value-init reward"
        )
    asked = config.prompt_length or resume.stored_prompt_length(config)
    config = dataclasses.replace(config, prompt_length=asked or 1)
    start.check_run(config)
    files.check_new(config.runs, config.name, resume=config.resume)
    resume.check_early(config, but=() if asked else ("prompt_length",))
    if prompts is None:
        if not isinstance(environment, Game):
            raise UserError("no prompts; give some (a game as environment has its own)")
        prompts = environment.instances(INSTANCES, config.seed)
    columns = table.read_columns(prompts)
    held_out = None if validation is None else table.read_columns(validation)
    load.use_compilation_cache()
    config, loaded = load.load_policy(config)
    start_id = encoding.start_token(config, loaded.tokenizer)
    encode = lambda columns, length, too_long: table.encode_columns(
        columns,
        loaded.tokenizer,
        length,
        too_long=too_long,
        start=start_id,
        extra={} if environment is None else episodes.instances(columns, environment),
    )
    encoded = encode(columns, asked, too_long)
    if config.teacher and "hint" in columns:
        encoded = table.with_hints(encoded, columns, loaded.tokenizer, start=start_id)
    chats = not all(isinstance(prompt, str) for prompt in columns["prompt"])
    config = dataclasses.replace(config, prompt_length=encoded.tokens.shape[1], chats=chats)
    check_fits(config, loaded.shape, loaded.tokenizer)
    world = None if environment is None else episodes.on_tokens(environment, loaded)
    make = lambda columns: _named_reward(config, loaded, reward, columns, weights, world)
    named = make(columns)
    made = algorithms.make_parts(config, named.fn)
    own = parts(made._replace(score_weights=named.score_weights, environment=world))
    if own.environment is not None:
        check_environment(own.environment, config, config.response_length, encoded.batch(config, 0))
    config = dataclasses.replace(config, functions=_functions(config, reward, own, named.fn))
    evaluate = None
    if held_out is not None:
        judged = own._replace(reward=make(held_out).fn)
        rows = encode(held_out, config.prompt_length, "last")
        evaluate = make_reward_validation(config, loaded, judged, rows)
    if named.fn is in_program.no_reward and processes.is_main():
        print(f"no reward: the policy learns from --teacher {config.teacher} alone")
    folder = files.run_folder(config.runs, config.name, resume=config.resume)
    fit(config, loaded, own, encoded, folder=folder, evaluate=evaluate)
    return Run(folder)


def _named_reward(
    config: RunConfig,
    policy: Policy,
    reward: Callable | Mapping[str, Callable] | None,
    columns: Mapping[str, list],
    weights: Mapping[str, float] | None,
    environment: Environment | None,
) -> function.NamedReward:
    if reward is not None:
        return function.from_user(reward, policy.tokenizer.decode_batch, columns, weights=weights)
    if not config.reward_model and environment is not None:
        return function.NamedReward(in_program.episode_score)
    if not config.reward_model and config.teacher:
        return function.NamedReward(in_program.no_reward)
    if not config.reward_model:
        raise UserError(
            "no reward; give a function, the folder of a run as reward_model, an environment or a "
            "teacher"
        )
    model, policy.frozen["reward"] = load.load_reward_model(config, policy.tokenizer)
    return function.NamedReward(in_program.reward_model(model))


def _functions(config: RunConfig, reward: Any, parts: Parts, made: Callable) -> str:
    """What tells apart runs that differ in a function: the reward, and the parts that
    are not those of the settings.
    """
    plain = algorithms.make_parts(config, made)._asdict()
    mark = lambda part: function.fingerprint(part) if callable(part) else repr(part)
    found = [] if reward is None else [f"reward {function.fingerprint(reward)}"]
    for name, part in parts._asdict().items():
        if name not in ("environment", "score_weights") and mark(part) != mark(plain[name]):
            found.append(f"{name} {'none' if part is None else mark(part)}")
    found += [f"weight {name} {x:g}" for name, x in parts.score_weights if x != 1]
    if parts.environment is not None:
        found.append(f"environment {function.fingerprint_whole(tuple(parts.environment))}")
    return ", ".join(found)


def open_run(folder: str | Path) -> Run:
    """Open a run, or the policy of a task's run. Raises UserError if there is none."""
    return Run(files.find_run(Path(folder)))

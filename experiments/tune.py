"""Settings by successive halving: many draws for a few steps, the best of them for more, and a file
of the winner's.

Question   Which settings learn most from a given number of samples?
Method     Random draws within ranges; each round trains every candidate from the start, on the same seeds, as one compiled
           program; one in `--keep` goes on, to a round of as many times the steps, so that each
           round costs the same samples (https://arxiv.org/abs/1502.07943). The configured settings
           take part; at the end both run on new seeds.
Command    python experiments/tune.py                          # --ranges lr=1e-4:1e-1:log lam=.5:1; ends with tuned.yaml
           python experiments/sweep.py --config tuned.yaml     # these settings on other seeds: --seed 100
Minutes    3 to 4 on one core that other work shared.
Found      On the ladder, 40 steps: lr .0128, clip_high .599, lam .919, entropy_coef .0005 end .113 higher than the configured
           settings on eight new seeds (95 % interval +.077 to +.150).
"""

from dataclasses import dataclass
from pathlib import Path

from ablations.scales import SCALES, AblationConfig, Arm, Claim, Question, ask

from jaxppo import cli
from jaxppo.ablation import sweep
from jaxppo.errors import UserError
from jaxppo.run import load


@dataclass(frozen=True)
class Tune:
    ranges: tuple[str, ...] = (
        "lr=3e-4:3e-2:log",
        "clip_high=.1:.6",
        "lam=.8:1",
        "entropy_coef=1e-4:1e-1:log",
    )
    """settings that can be swept, each with the ends of its range; :log draws from its logarithm"""
    candidates: int = 16
    """draws, the configured settings among them"""
    keep: int = 4
    """one in so many goes on to the next round"""
    steps: int = 10
    """training steps of the first round"""
    seeds: int = 2
    """runs of each candidate and task"""
    check: int = 8
    """new seeds on which the winner meets the configured settings"""
    scale: str = "ladder"
    """ladder | small (experiments/ablations/scales.py)"""
    seed: int = 0
    """of the draws"""
    out: Path = Path("tuned.yaml")
    """the file of settings"""
    tiny: bool = False
    traceback: bool = False


def draws(options: Tune, config) -> dict[str, Arm]:
    """The candidates by name; number 0 is as configured."""
    import numpy as np

    rng, drawn = np.random.default_rng(options.seed), {}
    for text in options.ranges:
        low, _, rest = text.partition("=")[2].partition(":")
        high, _, kind = rest.partition(":")
        (name, (a, b)) = next(iter(sweep.parse([f"{text.partition('=')[0]}={low},{high}"]).items()))
        if kind not in ("", "log") or (kind == "log" and min(a, b) <= 0):
            raise UserError(
                f"--ranges {text}: write it as {name}=.1:.5, or {name}=1e-4:1e-2:log above 0"
            )
        u = rng.uniform(size=options.candidates)
        drawn[name] = np.exp(np.log(a) + u * np.log(b / a)) if kind else a + u * (b - a)
    # as a person would write them: three digits
    arms = {
        str(i): Arm({name: float(f"{x[i]:.3g}") for name, x in drawn.items()})
        for i in range(1, options.candidates)
    }
    return {
        "0": Arm({name: x for name in drawn if (x := getattr(config, name)) is not None})
    } | arms


def main(options: Tune) -> None:

    if options.scale not in (
        known := [name for name in SCALES if name != "smollm2"]
    ):  # whose runs do not share a program
        raise UserError(f"--scale {options.scale!r}: choose one of {', '.join(known)}")
    if options.keep < 2:
        raise UserError(f"--keep {options.keep}: of so many candidates one goes on, so at least 2")
    load.use_compilation_cache()
    scale = SCALES[options.scale](options.tiny)
    first = arms = draws(options, scale.config)
    tried = steps = options.steps
    while len(arms) > 1:
        found = ask(
            Question("tune", arms, (), ("end",)),
            scale,
            AblationConfig(seeds=options.seeds, steps=steps, tiny=options.tiny),
        )
        # the mean: an interquartile mean would not see a task on which all seeds fail
        best = sorted(arms, key=lambda name: -found["arms"][name]["end"]["mean"][0])
        arms = {name: arms[name] for name in best[: max(len(best) // options.keep, 1)]}
        tried, steps = steps, steps * options.keep
    winner, default = next(iter(arms.values())), first["0"]
    if winner != default:
        both = {
            "tuned": winner._replace(first_seed=1000),
            "as configured": default._replace(first_seed=1000),
        }
        claim = Claim(
            "the winner beats the configured settings",
            "https://arxiv.org/abs/1502.07943",
            "tuned",
            "as configured",
        )
        check = AblationConfig(seeds=options.check, steps=tried, tiny=options.tiny)
        (answer,) = ask(Question("check", both, (claim,), ("end", "area")), scale, check)["claims"]
        winner = default if answer["verdict"] == "disagrees" else winner
    settings = {**winner.settings, "steps": tried}  # a schedule of so many is what was tried
    options.out.write_text("".join(f"{name}: {x}\n" for name, x in settings.items()))
    print(f"written: {options.out}: " + ", ".join(f"{name} {x:g}" for name, x in settings.items()))


if __name__ == "__main__":
    cli.script(main, Tune)

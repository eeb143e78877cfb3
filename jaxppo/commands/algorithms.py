"""`jaxppo algorithms`: list the algorithms."""

from dataclasses import dataclass

from jaxppo.config import Config
from jaxppo.presets import ALGORITHMS, preset


@dataclass(frozen=True)
class AlgorithmsOptions:
    """List the choices of --algorithm: their parts, one line about each, the paper.

    $ jaxppo algorithms
    $ jaxppo algorithms --settings
    """

    settings: bool = False
    """also print all settings of each"""


def algorithms(options: AlgorithmsOptions) -> None:
    """Print the parts, description and paper of each algorithm."""
    defaults = Config()
    names = ("loss", "advantage", "aggregate", "kl", "value_loss")
    for name, chosen in ALGORITHMS.items():
        full = preset(defaults, name)
        kl = "none" if full.kl_coef == 0 else f"{full.kl} in {full.kl_place}"
        parts = [full.update] if full.update != "gradient" else [full.loss]
        critic = "no critic" if full.value_loss == "none" else f"critic {full.critic}"
        parts += [full.advantage, full.aggregate, f"KL {kl}", critic]
        print(f"{name:30}{' | '.join(parts)}\n{'':30}{chosen.about}\n{'':30}{chosen.paper}")
        if options.settings:
            rest = [(key, x) for key, x in chosen.settings.items() if key not in names]
            words = [f"--{key.replace('_', '-')} {x}" for key, x in rest]
            print(f"{'':30}{' '.join(words)}")

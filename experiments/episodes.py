"""A small network plays a game of several turns.

Question   How near does a policy gradient come to the best play, from a start that plays well now
           and then?
Method     A supervised stage on episodes of which good play has a share of the turns (30 %), and
           random play the others; then PPO on episodes of its own. The environment runs inside the
           step's program (`jaxppo/environments`).
Command    python experiments/episodes.py --environment guess
           python experiments/episodes.py --environment tic_tac_toe --name tic_tac_toe
             --script-share 0.5 --sft-steps 1200 --lr 5e-4 --entropy-coef 0.01
           # maze | wordle | calculator | bandit_with_memory
           python experiments/episodes.py --environment calculator --game tool=False --name alone
Expected   Not measured on several seeds yet.
"""

from dataclasses import dataclass

from jaxppo import cli
from jaxppo.tasks import episodes
from jaxppo.tasks.episodes import EpisodeConfig


@dataclass(frozen=True)
class Episodes(EpisodeConfig):
    name: str = "episodes"
    tokens: str = "bytes"
    stop: tuple[str, ...] = ("\n",)
    width: int = 64
    layers: int = 2
    dropout: float = 0.0
    script_share: float = 0.3
    sft_steps: int = 800
    sft_lr: float = 2e-3
    steps: int = 150
    batch_size: int = 256
    minibatches: int = 2
    epochs: int = 2
    kl_coef: float = 0.0
    kl_adaptive: bool = False
    lr: float = 1e-3
    lora: int = 0
    eval_every: int = 50
    save_every: int = 50


def main(options: Episodes) -> None:
    episodes.run(options)


if __name__ == "__main__":
    cli.script(main, Episodes)

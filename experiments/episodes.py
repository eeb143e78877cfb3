"""A small network, or a pretrained model with adapters, plays a game of several turns.

Question   How near does a policy gradient come to the best play, from a start that plays well now
           and then?
Method     A supervised stage on episodes of which good play has a share of the turns, and random
           play the others; then PPO on episodes of its own. The environment runs inside the step's
           program (`jaxppo/environments`).
Command    python experiments/episodes.py --environment maze --game size=3 moves=6
           python experiments/episodes.py --environment wordle --game words=100 --lr 2e-4
             --steps 100
           python experiments/episodes.py --environment calculator --script-share 0.7
             --sft-steps 1000 --lr 3e-4 --steps 40
             # --game tool=False: without the calculator
           python experiments/episodes.py --environment guess --game n=20 guesses=4
             --script-share 0.3 --sft-episodes 2000 --sft-steps 800 --lr 1e-3 --entropy-coef 0
             --steps 80 --eval-every 40 --save-every 40
           python experiments/episodes.py --environment tic_tac_toe --script-share 0.7
             --sft-steps 2500
           # bandit_with_memory
           python experiments/episodes.py --environment guess --model smollm2 --lora 16
             --lora-on all --dtype bfloat16 --script-share 0.3 --sft-episodes 1000 --sft-steps 50
             --sft-batch-size 16 --sft-lr 1e-3 --sft-eval-every 10 --advantage rloo
             --value-loss none --group-size 8 --batch-size 64 --epochs 1 --entropy-coef 0
             --steps 40 --eval-every 20 --save-every 20 --instances 1000 --test-rows 200
Expected   Sampled episodes, five seeds each: .63 -> .97 (maze), .26 -> .74 (guess), .30 -> .87
           (wordle), .48 -> .84 (calculator; without it 0), .69 -> .99 (tic_tac_toe); SmolLM2, one
           seed: .27 -> .43 (guess): docs/environments.md.
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
    script_share: float = 0.5
    sft_episodes: int = 20000
    sft_steps: int = 1500
    sft_lr: float = 2e-3
    steps: int = 150
    batch_size: int = 256
    minibatches: int = 2
    epochs: int = 2
    kl_coef: float = 0.0
    kl_adaptive: bool = False
    lr: float = 5e-4
    entropy_coef: float = 0.01
    lora: int = 0
    eval_every: int = 50
    save_every: int = 50


def main(options: Episodes) -> None:
    episodes.run(options)


if __name__ == "__main__":
    cli.script(main, Episodes)

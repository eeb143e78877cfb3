# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # PPO on a language model, in one XLA program
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxppo/jaxppo/blob/main/experiments/colab.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/jaxppo/jaxppo/blob/main/experiments/kaggle.ipynb)
#
# SmolLM2-135M learns to continue film reviews positively. The reward is a classifier trained on
# rated sentences, and a KL penalty keeps the model's English. Then you train it with your own
# reward. The notebook chooses its sizes for a TPU, a GPU or a CPU, and uses all devices. So far it
# has run on CPUs only, where it takes a quarter of an hour or more. The downloads need no account.
#
# * **Colab**: Runtime → Change runtime type → v5e-1 TPU (or T4 GPU), then Runtime → Run all.
# * **Kaggle**: Settings → Accelerator → TPU v5e-8 and Settings → Turn on internet, then Run All.

# %%
REPOSITORY = "https://github.com/jaxppo/jaxppo"  # @param {type:"string"}
SEED = 0  # @param {type:"integer"}
STEPS = 50  # @param {type:"integer"}
REWARD = "classifier"  # @param ["classifier", "vader"]
SAVE_TO_DRIVE = False  # @param {type:"boolean"}

# %% [markdown]
# ## Set up
#
# On Colab and Kaggle this cell installs jaxppo. It keeps the machine's JAX, which matches the
# drivers, and installs only what is missing. Elsewhere install jaxppo first:
# `pip install -e ".[demo]"` in the repository.

# %%
import os
import subprocess
import sys
from pathlib import Path

ON_KAGGLE = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
try:
    import google.colab  # noqa: F401

    ON_COLAB = not ON_KAGGLE  # Kaggle's machines have this package, too
except ImportError:
    ON_COLAB = False

if ON_COLAB or ON_KAGGLE:
    if not Path("jaxppo/pyproject.toml").exists():
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "jaxppo"], check=True)
    from importlib.metadata import version

    if tuple(int(part) for part in version("jax").split(".")[:2]) < (0, 10):
        newest = (
            "Runtime, Change runtime type, the newest version"
            if ON_COLAB
            else "Settings, Environment preferences, Always use latest environment"
        )
        raise SystemExit(f"JAX is {version('jax')} here, and jaxppo needs 0.10: {newest}")
    kept = [f"{name}=={version(name)}" for name in ("jax", "jaxlib")]
    Path("kept.txt").write_text("\n".join(kept))
    # Kaggle's TPU machines may have a libtpu older than the one that their JAX needs
    extras = "demo,tpu" if ON_KAGGLE and "ISTPUVM" in os.environ else "demo"
    package = f"jaxppo[{extras}]"
    command = [sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", "-e", package]
    subprocess.run(command, check=True)
    root = Path("jaxppo").resolve()
else:
    import jaxppo

    root = Path(jaxppo.__file__).resolve().parents[1]
for folder in (root, root / "experiments"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# %% [markdown]
# ## Which machine is this?

# %%
import jax

from jaxppo.costs import chips

devices = jax.devices()
backend, kind = jax.default_backend(), devices[0].device_kind
machine = chips.KINDS.get(kind) or next(
    (name.lower() for name in chips.GPUS if name in kind), backend
)
parallel = "pmap" if len(devices) > 1 else "jit"  # each device takes an equal part of the batch
print(f"JAX {jax.__version__} on {len(devices)} x {kind} ({machine}), parallel by {parallel}")
if backend == "cpu" and ON_COLAB:
    print(
        "There is no accelerator, so this will be slow. To get one: Runtime -> Change runtime type "
        "-> v5e-1 TPU or T4 GPU -> Save, then Runtime -> Run all. If you chose a TPU and it is not "
        "found: Runtime -> Disconnect and delete runtime, then connect again."
    )
if backend == "cpu" and ON_KAGGLE:
    print(
        "There is no accelerator, so this will be slow. To get one: Settings -> Accelerator -> "
        "TPU v5e-8 or GPU T4 x2, then Run All."
    )

# %% [markdown]
# ## Train
#
# The batch size depends on the machine: an accelerator has room for more rollouts a step. A T4 has
# no bfloat16. To resume, run all cells again on the same kind of machine: training continues from
# the last checkpoint, if the files are still there. Colab deletes them with the runtime, unless you
# set SAVE_TO_DRIVE. Kaggle keeps them if Session options → Persistence is "Files only". You can
# raise STEPS to continue a finished run. Another REWARD, SEED or machine starts another run with
# its own name.

# %%
import sentiment

from jaxppo.errors import RunError

SIZES = {"cpu": {}, "gpu": {"batch_size": 128}, "tpu": {"batch_size": 128}}
chosen = dict(SIZES.get(backend, {}))
if "T4" in kind:
    chosen["dtype"] = "float32"
runs, name = Path("runs"), f"sentiment-{REWARD}-{SEED}-{machine}"
on_drive = SAVE_TO_DRIVE and ON_COLAB
if on_drive:
    from google.colab import drive

    drive.mount("/content/drive")
    runs = Path("/content/drive/MyDrive/jaxppo")
SMOKE = bool(os.environ.get("JAXPPO_SMOKE"))  # set by the test of this notebook
if SMOKE:
    STEPS, chosen = 2, {"tiny": True, "minibatches": 1}
resume = (runs / name / "config.json").exists()
options = sentiment.Sentiment(
    name=name,
    runs=str(runs),
    seed=SEED,
    steps=STEPS,
    reward=REWARD,
    parallel=parallel,
    eval_every=min(10, STEPS),
    resume=resume,
    **chosen,
)
try:
    sentiment.main(options)
except RunError as error:  # the next cells would show another run
    raise SystemExit(f"error: {error}") from None

# %% [markdown]
# ## Results
#
# `run.metrics` has every metric as a NumPy array, with one value a step.

# %%
from IPython.display import Image, display

from jaxppo import train

run = train.open_run(runs / name)
for metric in ("reward", "kl"):
    first, last = run.metrics[metric][[0, -1]]
    print(f"{metric} {first:+.3f} in the first step, {last:+.3f} in the last")
display(Image(str(runs / name / "curves.png")))

# %%
import json

for line in (runs / name / "outputs.jsonl").read_text().splitlines()[:8]:
    row = json.loads(line)
    print(f"{row['prompt']!r}\n  before {row['sentiment_before']:+.2f} {row['before']!r}")
    print(f"  after  {row['sentiment_after']:+.2f} {row['after']!r}\n")
result = json.loads((runs / name / "result.json").read_text())
print(
    f"judge {result['sentiment_before']:+.3f} -> {result['sentiment_after']:+.3f} "
    f"at {result['kl']:.2f} nats a continuation"
)

# %% [markdown]
# ## The model
#
# Export the best checkpoint with its tokenizer and model card, in bfloat16 (0.3 GB), and continue
# two prompts of your own.

# %%
import shutil

shutil.rmtree(runs / name / "model", ignore_errors=True)  # an export of fewer steps
model = run.export(runs / name / "model", dtype="bfloat16")

# %%
prompts = ["The film is", "I went to see it with"]
for prompt, response in zip(prompts, run.sample(prompts), strict=True):
    print(f"{prompt}{response}\n")

# %% [markdown]
# ## Your own reward
#
# A reward is a function of a prompt and its response. This one likes short words. Put in your own
# prompts and reward; another `name` starts another run.

# %%
prompts = ["The weather today is", "My favourite food is", "Every morning I", "We learn that"]


def reward(prompt, response):
    words = response.split()
    return -sum(map(len, words)) / len(words) if words else -10.0


own = train.policy(
    prompts,
    reward,
    model="smollm2",
    algorithm="rloo",
    steps=10,
    runs=str(runs),
    name="own-reward",
    resume=True,
    parallel=parallel,
    tiny=SMOKE,
)
print("reward of each step:", own.metrics["reward"].round(2))

# %%
for prompt, response in zip(prompts, own.sample(prompts), strict=True):
    print(f"{prompt}{response}\n")

# %% [markdown]
# ## Keep it
#
# The run's folder holds the settings, metrics, samples, checkpoints and model. On Drive it stays.
# Without Drive, this cell packs the important files. Colab downloads them; on Kaggle they are in
# /kaggle/working, under Output.

# %%
import zipfile

if on_drive:
    print(f"on Drive: {runs / name}")
else:
    kept = ["config.json", "metrics.jsonl", "outputs.jsonl", "result.json", "curves.png"]
    kept += sorted(
        str(path.relative_to(runs / name)) for path in model.rglob("*") if path.is_file()
    )
    with zipfile.ZipFile(runs / f"{name}.zip", "w") as archive:
        for part in kept:
            archive.write(runs / name / part, f"{name}/{part}")
    print(f"written: {runs / name}.zip")
if ON_COLAB and not on_drive:
    from google.colab import files

    files.download(str(runs / f"{name}.zip"))

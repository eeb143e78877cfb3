# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # PPO on a language model, in one XLA program
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxppo/jaxppo/blob/main/experiments/colab.ipynb)
#
# SmolLM2-135M learns to continue film reviews positively. The reward is a classifier trained on
# rated sentences, and a KL penalty keeps the model's English. The notebook chooses its sizes for a
# TPU v5e-1, a T4 or a CPU. So far it has run on CPUs only, where it takes a quarter of an hour or
# more. No account is needed for the downloads.
#
# **Runtime → Change runtime type → v5e-1 TPU** (or T4 GPU), then **Runtime → Run all**.

# %%
REPOSITORY = "https://github.com/jaxppo/jaxppo"  # @param {type:"string"}
SEED = 0  # @param {type:"integer"}
STEPS = 50  # @param {type:"integer"}
REWARD = "classifier"  # @param ["classifier", "vader"]
SAVE_TO_DRIVE = False  # @param {type:"boolean"}

# %% [markdown]
# ## Set up
#
# On Colab this cell installs jaxppo. It keeps Colab's JAX, which matches the runtime's drivers, and
# installs only what is missing. Elsewhere install jaxppo first: `pip install -e ".[demo]"` in the
# repository.

# %%
import os
import subprocess
import sys
from pathlib import Path

try:
    import google.colab  # noqa: F401

    ON_COLAB = True
except ImportError:
    ON_COLAB = False

if ON_COLAB:
    if not Path("jaxppo/pyproject.toml").exists():
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "jaxppo"], check=True)
    from importlib.metadata import version

    if tuple(int(part) for part in version("jax").split(".")[:2]) < (0, 10):
        raise SystemExit(
            f"JAX is {version('jax')} here, and jaxppo needs 0.10: "
            "Runtime, Change runtime type, the newest version"
        )
    kept = [f"{name}=={version(name)}" for name in ("jax", "jaxlib")]
    Path("kept.txt").write_text("\n".join(kept))
    command = [sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", "-e", "jaxppo[demo]"]
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

backend, kind = jax.default_backend(), jax.devices()[0].device_kind
machine = chips.KINDS.get(kind) or next(
    (name.lower() for name in chips.GPUS if name in kind), backend
)
print(f"JAX {jax.__version__} on {len(jax.devices())} x {kind} ({machine})")
if backend == "cpu" and ON_COLAB:
    print(
        "There is no accelerator, so this will be slow. To get one: Runtime -> Change runtime type "
        "-> v5e-1 TPU or T4 GPU -> Save, then Runtime -> Run all. If you chose a TPU and it is not "
        "found: Runtime -> Disconnect and delete runtime, then connect again."
    )

# %% [markdown]
# ## Train
#
# The batch size depends on the machine: an accelerator has room for more rollouts a step. A T4 has
# no bfloat16. To resume, run all cells again on the same kind of machine: training continues from
# the last checkpoint. If Colab ends the runtime, this works only with SAVE_TO_DRIVE, because the
# files are deleted with the runtime. You can raise STEPS to continue a finished run. Another
# REWARD, SEED or machine starts another run with its own name.

# %%
import sentiment

from jaxppo.errors import RunError

SIZES = {"cpu": {}, "gpu": {"batch_size": 128}, "tpu": {"batch_size": 128}}
chosen = dict(SIZES.get(backend, {}))
if "T4" in kind:
    chosen["dtype"] = "float32"
runs, name = Path("runs"), f"colab-{REWARD}-{SEED}-{machine}"
on_drive = SAVE_TO_DRIVE and ON_COLAB
if on_drive:
    from google.colab import drive

    drive.mount("/content/drive")
    runs = Path("/content/drive/MyDrive/jaxppo")
if os.environ.get("JAXPPO_SMOKE"):  # set by the test of this notebook
    STEPS, chosen = 2, {"tiny": True, "parallel": "jit"}
resume = (runs / name / "config.json").exists()
options = sentiment.Sentiment(
    name=name,
    runs=str(runs),
    seed=SEED,
    steps=STEPS,
    reward=REWARD,
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

# %%
from IPython.display import Image, display

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
# Export the run's best checkpoint with its tokenizer and model card, in bfloat16 (0.3 GB), as
# `jaxppo export` does. Then continue two prompts of your own, as `jaxppo sample` does.

# %%
import shutil

from jaxppo.commands import export

model = runs / name / "model"
shutil.rmtree(model, ignore_errors=True)  # an export of fewer steps
export.export(export.ExportOptions(runs / name, model, dtype="bfloat16"))

# %%
from jaxppo.commands import sample

sample.sample(sample.SampleOptions(runs / name, ("The film is", "I went to see it with")))

# %% [markdown]
# ## Keep it
#
# The run's folder holds the settings, metrics, samples, checkpoints and model. On Drive it stays.
# Without Drive it is deleted with the runtime, so this cell downloads the important files.

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

"""PPO and the policy-gradient family for language models, each step one XLA program.

Nothing heavy is imported here: `jaxppo --help` answers without JAX. Import what you
need from the modules: `jaxppo.train.policy` starts a run,
`jaxppo.ppo.make_train_step` is the algorithm, and `jaxppo.algorithms` has the tables
from names in the settings to functions.
"""

import glob
import os

# Without a TPU, libtpu (the extra `tpu-plan`) prints that it does not know this
# machine's kind and name, unless it is told. It finds no device either way.
if not any(map(glob.glob, ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/tpu*"))):
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

__version__ = "0.1.0"

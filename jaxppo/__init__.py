"""PPO and the policy-gradient family for language models, each step one XLA program.

Nothing heavy is imported here: `jaxppo --help` answers without JAX. Import what you
need from the modules: `jaxppo.ppo.make_train_step` is the algorithm,
`jaxppo.algorithms` the tables of names.
"""

__version__ = "0.1.0"

"""Metadata of impala_jax: what it needs, and what its extras add.

Bounds are loose here; the two sets of versions that are tested together are pinned
in requirements/. Where an upper bound stands, the reason stands beside it.
"""

import setuptools

EXTRAS = {
  # dm-reverb's wheel is built against TensorFlow 2.15 (Python < 3.12, numpy < 2).
  # TensorFlow's metadata asks for an ml-dtypes older than JAX accepts, though the
  # newer one works: pip refuses this extra. Install requirements/cluster.txt with
  # `pip install --no-deps -r` (`make setup` does the like), or use an installer that
  # can override a dependency, as uv does by pyproject.toml.
  'reverb': [
    'dm-reverb==0.14.0; python_version < "3.12"',
    'tensorflow-cpu==2.15.1; python_version < "3.12"',
    'protobuf>=4.25,<5',
  ],
  # ale-py carries the ROMs and the native vector environment.
  'atari': ['ale-py>=0.11', 'gymnasium>=1.1'],
  'gymnasium': ['gymnasium>=1.1'],
  # DeepMind Lab has no wheel: build the module `deepmind_lab` from its sources. The
  # extra exists so that `impala_jax[dmlab]` says what it means wherever it is asked
  # for.
  'dmlab': [],
  # The engine itself needs numpy alone; the rest is for its gymnasium environments.
  'doom': ['vizdoom>=1.3'],
  # Convolutions on CPU twice as fast; there is a build for x86-64 and Linux alone.
  'onednn': [
    'onednn-cpu-gomp>=2023.2; platform_machine == "x86_64" and sys_platform == "linux"'
  ],
  'plots': ['matplotlib>=3.8'],
  # Mutual TLS besides needs the program stunnel, from the system's packages.
  'tls': ['cryptography>=42'],
  'video': ['imageio-ffmpeg>=0.5'],
  'notebooks': ['ipykernel>=6', 'matplotlib>=3.8', 'nbclient>=0.8', 'nbformat>=5.9'],
  'dev': [
    'hypothesis>=6.100',
    'kubernetes-validate>=1.30',
    'mypy>=1.10',
    'packaging>=23',
    'pip>=24',
    # pytest-xdist 3.8 puts its groups into an attribute that pytest 9.2 has no more:
    # all tests would be dealt out singly, without a word.
    'pytest>=8,<9.2',
    'pytest-timeout>=2.3',
    'pytest-xdist>=3.6',
    'ruff>=0.6',
    'setuptools>=70.1',
  ],
}
# Everything that pip can install together, whatever the machine has.
EXTRAS['all'] = sorted(
  {requirement for name in EXTRAS if name != 'reverb' for requirement in EXTRAS[name]}
)
# Without one of these JAX computes on the CPU alone.
EXTRAS |= {name: [f'jax[{name}]'] for name in ('cuda12', 'cuda13', 'tpu')}

setuptools.setup(
  name='impala_jax',
  version='0.2.0',
  description='IMPALA (V-trace) in JAX: from a laptop to a thousand actors.',
  author='The impala_jax authors',
  license='Apache-2.0',
  python_requires='>=3.11',
  # Neither `launch` nor `experiments`: others have packages of these names.
  packages=setuptools.find_packages(include=['impala_jax', 'impala_jax.*']),
  package_data={'impala_jax': ['py.typed'], 'impala_jax.onednn': ['calls.c']},
  entry_points={'console_scripts': ['impala = impala_jax.commands.main:main']},
  install_requires=[
    'absl-py>=2.1',
    'chex>=0.1.86',
    'dm-env>=1.6',
    'flax>=0.12',
    'grpcio>=1.60',
    'jax>=0.7.1',
    'msgpack>=1',
    'numpy>=1.26',
    'optax>=0.2.4',
    'psutil>=5.9',
    'pyyaml>=6',
    'rich>=13',
    'scipy>=1.11',
    'shtab>=1.9',
    'tensorboardX>=2.6',
    'xxhash>=3.4',
  ],
  extras_require=EXTRAS,
  # Without a C compiler it is left out, and XLA's own convolutions are used. Nothing of
  # Python is in it: it is loaded by ctypes.
  ext_modules=[
    setuptools.Extension(
      'impala_jax.onednn._calls',
      ['impala_jax/onednn/calls.c'],
      extra_compile_args=['-pthread'],
      extra_link_args=['-pthread'],
      optional=True,
    )
  ],
)

"""Counting kernels and bytes in a compiled program."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu_program


def test_a_loop_counts_as_often_as_it_runs_and_its_outputs_once():
  def program(x, w):
    step = lambda x, _: ((x @ w).sum(1, keepdims=True) + x, x)
    return jax.lax.scan(step, x, None, length=7)

  spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  text = jax.jit(program).lower(spec(64, 32), spec(32, 48)).compile().as_text()
  found = gpu_program.kernels(text)
  products = [
    k for k in found if 'dot_general' in k.source and 'f32[64,48]' in k.result
  ]
  assert [k.launches for k in products] == [7]
  # Operands and result of the product, seven times.
  assert products[0].gigabytes == round(7 * 4 * (64 * 32 + 32 * 48 + 64 * 48) / 1e9, 4)
  # The states before each step: [7, 64, 32] in all, of which a step writes one.
  written = [
    k for k in found if k.result.startswith('f32[7,64,32]') and k.launches == 7
  ]
  assert written
  assert all(k.gigabytes < 7 * 4 * 64 * 32 * 4 / 1e9 for k in written)


def test_shapes():
  nbytes = gpu_program._nbytes
  assert nbytes('bf16[3,5]{1,0}', 1) == 30
  assert nbytes('(f32[2,4]{1,0}, pred[7]{0}, s32[])', 1) == 32 + 7 + 4
  assert nbytes('f32[101,2,4]{2,1,0}', 101) == 32
  assert nbytes('f32[101,2,4]{2,1,0}', 1) == 101 * 32


def test_without_a_compiler_for_cuda_one_clear_line(tmp_path):
  # A plugin that is installed here would compile.
  (tmp_path / 'sitecustomize.py').write_text(
    "import sys; sys.modules['jax_plugins'] = None\n"
  )
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.benchmarks.gpu_program', '--batch=1'],
    env={**os.environ, 'PYTHONPATH': f'{tmp_path}:.', 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1
  assert 'no compiler for CUDA' in done.stderr
  assert 'Traceback' not in done.stderr

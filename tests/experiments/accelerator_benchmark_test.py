"""The benchmark for accelerators, on what is here."""

import argparse

import jax

from experiments.benchmarks import accelerator_benchmark


def test_figures_of_an_update_hang_together():
  args = argparse.Namespace(unroll=2, dtype='float32', profile=None)
  ceiling = {
    'matmul_float32_flops': 1e9,
    'memory_bytes_per_second': 1e9,
    'host_to_device_bytes_per_second': 1e9,
  }
  devices = jax.local_device_count()
  found = accelerator_benchmark.update(args, devices, ceiling)
  assert found['frames_per_second'] >= 4 * found['agent_steps_per_second'] - 4
  # Three frames an unroll, a tenth of a MB of rounding, little else.
  frames = devices * 3 * 72 * 96 * 3
  assert abs(found['batch_megabytes'] - frames / 2**20) < 0.1
  # Of one device, the LSTM and the linear layers alone: XLA does not count oneDNN's.
  weights = 3456 * 256 + 4 * 256 * (256 + 256)
  assert found['flops'] > 2 * 3 * weights
  assert found['floor_ms']['operations'] == round(found['flops'] / 1e6, 3)


def test_the_gradient_of_bfloat16_is_near_that_of_float32():
  found = accelerator_benchmark.numerics(2, 1)
  assert 1e-4 < found['gradient_relative_error'] < 0.1
  assert found['gradient_relative_error'] <= found['worst_leaf_relative_error']
  assert found['loss_relative_error'] < 0.1

"""The benchmark of inference: where another way begins to pay, and that it runs."""

import json
import pathlib
import subprocess
import sys

from experiments.benchmarks import inference_benchmark

ROOT = pathlib.Path(__file__).parents[2]


def _row(name, number, rate, cost):
  return {
    name: number,
    'steps_per_second': {'median': rate},
    'cpu_seconds_per_1000_steps': {'median': cost},
  }


def test_break_even():
  batch = lambda *x: _row('batch', *x)
  clients = lambda *x: _row('clients', *x)
  local = {
    'cpu': {'by_batch': [batch(1, 100, 9.0), batch(32, 500, 2.0), batch(64, 450, 2.5)]},
    'gpu': {'by_batch': [batch(1, 90, 8.0), batch(32, 499, 1.9), batch(64, 900, 1.0)]},
  }
  served = {
    'cpu': {'by_clients': [clients(1, 400, 3.0), clients(8, 900, 2.0)]},
    'gpu': {'by_clients': [clients(1, 400, 2.1), clients(8, 4001, 1.2)]},
  }
  assert inference_benchmark._break_even(local, served, 32) == {
    'gpu: batch, by speed': 64,
    'gpu: batch, by CPU time': 32,
    'server on cpu: clients, by CPU time': None,
    'server on cpu: clients, by speed against as many CPU threads': None,
    'server on gpu: clients, by CPU time': 8,
    'server on gpu: clients, by speed against as many CPU threads': 8,
  }
  assert inference_benchmark._break_even({'gpu': local['gpu']}, {}, 32) == {}


def test_it_runs():
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.benchmarks.inference_benchmark',
      '--torso=mlp',
      '--hidden=8',
      '--frame=8',
      '--batches=2,4',
      '--clients=2',
      '--envs=4',
      '--platforms=cpu',
      '--seconds=0.1',
      '--repeats=2',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=250,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert [r['batch'] for r in found['local']['cpu']['by_batch']] == [2, 4]
  (row,) = found['server']['cpu']['by_clients']
  assert row['clients'] == 2
  assert 4 <= row['rows_per_batch']['max'] <= 8
  assert row['steps_per_second']['min'] > 0

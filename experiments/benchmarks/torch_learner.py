"""The same update in PyTorch, for comparison: run by learner_comparison.py.

  PYTHON_WITH_TORCH torch_learner.py --torso deep --batch 8

It needs PyTorch and nothing of this project. After each line on its input it makes
`--updates` updates and prints their time as JSON. Channels-last; batches lie in host
memory, frames stacked already; `--compile` and `--dtype bfloat16` (by autocast) are for
GPUs, as neither pays on CPU.
"""

import argparse
import json
import os
import resource
import sys
import time

import torch
from torch import nn
from torch.nn import functional


class Deep(nn.Module):
  def __init__(self, channels):
    super().__init__()
    self.first, self.blocks = nn.ModuleList(), nn.ModuleList()
    for size in (16, 32, 32):
      self.first.append(nn.Conv2d(channels, size, 3, padding=1))
      convolve = lambda size=size: nn.Conv2d(size, size, 3, padding=1)
      self.blocks.append(nn.ModuleList([convolve() for _ in range(4)]))
      channels = size

  def forward(self, x):
    for first, block in zip(self.first, self.blocks, strict=True):
      x = functional.max_pool2d(first(x), 3, 2, 1)
      for i in (0, 2):
        y = block[i](functional.relu(x))
        x = x + block[i + 1](functional.relu(y))
    return functional.relu(x)


def nature(channels):
  sizes = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
  layers = []
  for size, kernel, stride in sizes:
    layers += [nn.Conv2d(channels, size, kernel, stride), nn.ReLU()]
    channels = size
  return nn.Sequential(*layers)


class Agent(nn.Module):
  def __init__(self, args, height, width, channels, actions):
    super().__init__()
    self.torso = Deep(channels) if args.torso == 'deep' else nature(channels)
    with torch.no_grad():
      flat = self.torso(torch.zeros(1, channels, height, width)).numel()
    self.hidden = nn.Linear(flat, args.hidden)
    self.core = nn.LSTM(args.hidden, args.lstm) if args.lstm else None
    self.heads = nn.Linear(args.lstm or args.hidden, actions + 1)

  def forward(self, frames):
    steps, batch = frames.shape[:2]
    # NHWC in memory is what PyTorch calls channels-last.
    x = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    x = functional.relu(self.hidden(self.torso(x).flatten(1)))
    x = x.view(steps, batch, -1)
    if self.core is not None:
      x, _ = self.core(x)
    out = self.heads(x)
    return out[..., :-1], out[..., -1]


def loss(agent, frames, actions, rewards, discounts, behaviour_log_prob):
  logits, values = agent(frames)
  log_policy = functional.log_softmax(logits[:-1].float(), -1)
  log_prob = log_policy.gather(-1, actions[..., None])[..., 0]
  values = values.float()
  with torch.no_grad():
    rho = (log_prob - behaviour_log_prob).exp().clamp(max=1.0)
    deltas = rho * (rewards + discounts * values[1:] - values[:-1])
    correction, corrections = torch.zeros_like(values[0]), []
    for t in reversed(range(len(rewards))):
      correction = deltas[t] + discounts[t] * rho[t] * correction
      corrections.append(correction)
    targets = values[:-1] + torch.stack(corrections[::-1])
    following = torch.cat([targets[1:], values[-1:]])
    advantages = rho * (rewards + discounts * following - values[:-1])
  entropy = -(log_policy.exp() * log_policy).sum()
  policy = -(log_prob * advantages).sum()
  baseline = 0.5 * ((targets - values[:-1]) ** 2).sum()
  return policy + 0.5 * baseline - 0.01 * entropy


def batch_of(args, height, width, channels, actions):
  steps, batch = args.unroll, args.batch
  pin = args.device == 'cuda'
  tensors = (
    torch.randint(
      0, 255, (steps + 1, batch, height, width, channels), dtype=torch.uint8
    ),
    torch.randint(0, actions, (steps, batch)),
    torch.randn(steps, batch).clamp(-1, 1),
    torch.full((steps, batch), 0.99),
    torch.full((steps, batch), -1.79),
  )
  return [t.pin_memory() if pin else t for t in tensors]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--torso', default='nature', choices=['nature', 'deep'])
  parser.add_argument('--hidden', type=int, default=512)
  parser.add_argument('--lstm', type=int, default=0)
  parser.add_argument('--frame', default='84,84,4', help='height,width,channels')
  parser.add_argument('--unroll', type=int, default=20)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--updates', type=int, default=2)
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
  parser.add_argument('--compile', action='store_true')
  args = parser.parse_args()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  height, width, channels = (int(x) for x in args.frame.split(','))
  actions = 6
  agent = Agent(args, height, width, channels, actions)
  agent = agent.to(args.device, memory_format=torch.channels_last)
  run = torch.compile(loss) if args.compile else loss
  optimizer = torch.optim.RMSprop(agent.parameters(), lr=6e-4, alpha=0.99, eps=0.1)
  batches = [batch_of(args, height, width, channels, actions) for _ in range(3)]

  def update(batch):
    moved = [tensor.to(args.device, non_blocking=True) for tensor in batch]
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == 'bfloat16'):
      value = run(agent, *moved)
    value.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), 40.0)
    optimizer.step()

  def finish():
    if args.device == 'cuda':
      torch.cuda.synchronize()

  for batch in batches:
    update(batch)
  finish()
  print(json.dumps({'versions': {'torch': torch.__version__}}), flush=True)
  for _ in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(args.updates):
      update(batches[i % len(batches)])
    finish()
    answer = {
      'update_ms': (time.perf_counter() - wall) / args.updates * 1e3,
      'update_cpu_ms': (time.process_time() - cpu) / args.updates * 1e3,
      'peak_rss_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()

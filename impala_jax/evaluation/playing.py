"""Plays whole episodes with given parameters: one vector, or many levels in parallel.

What is measured is unbiased because how many episodes each environment plays is
decided before it begins: none is left out because others ended first. With a fixed
time instead of a fixed number, short episodes would be counted more often than they
occur. An episode whose engine fails is played anew, and the failure is counted.
"""

import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from impala_jax import components, types
from impala_jax.acting import device_policy
from impala_jax.agents import agent as agent_lib
from impala_jax.environments import base, registry

_PATIENCE = 600.0  # Seconds, at least, for any environment to become ready.
# For `arrange`: the start of an engine, in episodes, and the longest level, in means.
_START = 0.2
_LONGEST = 2.0


def play(
  agent: agent_lib.Agent,
  params: types.Nest,
  environment: base.VectorEnvironment,
  *,
  seed: int,
  episodes: int | Sequence[int] = 1,
  greedy: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
  on_step: Callable[[], None] = lambda: None,
  on_episode: Callable[[base.EpisodeEnd], None] = lambda episode: None,
  on_failure: Callable[[base.Failure], None] = lambda failure: None,
  max_steps: int | None = None,
  patience: float = _PATIENCE,
) -> list[base.EpisodeEnd]:
  """The first episodes of each environment.

  Environments need not be ready together: those that are have one policy call, of
  always the same batch shape. One that has played its episodes goes on (some vectors
  only step as a whole), but nothing of it counts.

  Args:
    agent: the policy.
    params: of the policy.
    environment: closed by the caller.
    seed: of environments and sampling. With one environment it decides everything
      that the engine lets it decide; with several also the order in which they
      become ready.
    episodes: how many of each environment, or [num_envs].
    greedy: take the likeliest action instead of sampling one.
    should_stop: asked at least every second; ends the play early.
    on_step: called after each policy call, before the environments go on.
    on_episode: called with each episode that counts.
    on_failure: called with each failure of an engine; what it played since its last
      whole episode does not count, and is played again.
    max_steps: policy calls after which the play ends.
    patience: seconds without any environment that is ready, after which it fails.

  Returns:
    The episodes that ended; fewer than asked for only where stopped early.

  Raises:
    TimeoutError: no environment became ready for `patience` seconds.
    base.EngineError: an engine failed too often.
  """
  count = environment.num_envs
  left = np.array(np.broadcast_to(episodes, count))
  policy = device_policy.DevicePolicy(agent, count, [count], seed=seed, greedy=greedy)
  policy.set_parameters(0, params)
  last_action = np.zeros(count, np.int32)
  nothing_begins = np.zeros(count, bool)
  ended: list[base.EpisodeEnd] = []
  environment.reset(seed)
  steps = 0
  deadline = time.monotonic() + patience
  while left.any() and not should_stop() and (max_steps is None or steps < max_steps):
    try:
      ready = environment.recv(timeout=1.0)
    except TimeoutError:
      if time.monotonic() > deadline:
        raise TimeoutError(
          f'none of {count} environments became ready in {patience:.0f} s'
        ) from None
      continue
    deadline = time.monotonic() + patience
    for failure in ready.failures:
      on_failure(failure)
    # Engines in `ready.restarted` begin with FIRST, where the agent forgets, and the
    # episodes that they broke off are in no `ready.episodes`.
    for episode in ready.episodes:
      if left[episode.env_id]:
        left[episode.env_id] -= 1
        ended.append(episode)
        on_episode(episode)
    ids = ready.env_ids
    running = policy.start(
      ids, ready.timestep, last_action[ids], nothing_begins[: len(ids)]
    )
    (action, _, _), _ = policy.finish(running)
    last_action[ids] = action
    steps += 1
    on_step()  # Some environments only have their picture until they get an action.
    environment.send(ids, action)
  return ended


class LevelResult(NamedTuple):
  """What was played of one level."""

  task_id: int
  planned: int  # Episodes.
  episodes: list[base.EpisodeEnd]
  failures: list[base.Failure]  # Of engines that were replaced.
  error: str = ''  # Why the level could not be played to the end.

  @property
  def complete(self) -> bool:
    return not self.error and len(self.episodes) == self.planned

  @property
  def returns(self) -> list[float]:
    return [e.episode_return for e in self.episodes]


def arrange(levels: int, episodes: int, processes: int) -> tuple[int, int]:
  """How `processes` environments at a time are dealt out: (width, lanes).

  A level is played by `width` environments side by side whose shares of its episodes
  differ by one at most; `lanes` levels are played at a time, and a lane that is done
  with a level takes the next. Wide levels end together, since episodes of one level
  are of a kind (most end by the clock), but a share is a whole number of episodes;
  with many lanes, some are idle at the end, while the last and longest levels are
  played. Of all ways to cut up `processes` that with the earliest end is taken, as
  estimated for levels of which the longest takes twice the mean.
  """

  def end(width: int) -> float:
    lanes = min(levels, processes // width)
    one_level = -(-episodes // width) + _START
    return one_level * (levels / lanes + _LONGEST * (1 - 1 / lanes))

  width = min(range(1, min(episodes, processes) + 1), key=end)
  return width, min(levels, processes // width)


def play_levels(
  parts: components.Components,
  params: types.Nest,
  tasks: Sequence[int],
  episodes: int,
  *,
  processes: int,
  seed: int,
  greedy: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
  on_begin: Callable[[int], None] = lambda task_id: None,
  on_episode: Callable[[base.EpisodeEnd], None] = lambda episode: None,
  on_level: Callable[[LevelResult], None] = lambda result: None,
) -> list[LevelResult]:
  """Plays `episodes` whole episodes of each level; see `arrange`.

  A level that fails (an engine that fails too often, say) does not hold up the
  others: its result has an `error`.

  Args:
    parts: of the run.
    params: of its agent.
    tasks: indices of levels in `environment.levels`, distinct.
    episodes: of each level, at least 1.
    processes: environments at a time, at least 1; in suites whose engines run in
      processes of their own so many processes.
    seed: each level derives its own from it, whatever else is played.
    greedy: take the likeliest action instead of sampling one.
    should_stop: asked about ten times a second; what is there then is returned.
    on_begin: called in this thread, as are the others, when a level is begun.
    on_episode: called with each episode that ended.
    on_level: called with each level that is done with.

  Returns:
    One result for each of `tasks`, in their order.
  """
  width, lanes = arrange(len(tasks), episodes, processes)
  # Engines are replaced by the vector after their own time-outs; this is for the rest.
  engines = registry.engine_settings(parts.config)
  patience = _PATIENCE + 2 * (engines.reset_timeout + engines.step_timeout)
  params = jax.device_put(params)
  news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
  stop = threading.Event()

  def lane(task_id: int) -> LevelResult:
    result = LevelResult(task_id, episodes, [], [])

    def ended(episode: base.EpisodeEnd) -> None:
      result.episodes.append(episode)
      news.put(lambda: on_episode(episode))

    if stop.is_set():
      return result
    news.put(lambda: on_begin(task_id))
    level = parts.config.environment.levels[task_id]
    try:
      environment = parts.make_evaluation(level, width)
      try:
        play(
          parts.agent,
          params,
          environment,
          seed=_level_seed(seed, task_id),
          episodes=_shares(episodes, width),
          greedy=greedy,
          should_stop=stop.is_set,
          on_episode=ended,
          on_failure=result.failures.append,
          patience=patience,
        )
      finally:
        environment.close()
    except Exception as e:
      # Of anything but engines somebody will want to know where it came from.
      trace = not isinstance(e, base.EngineError | TimeoutError)
      logging.error('level %s was given up: %s', level, e, exc_info=trace)
      result = result._replace(error=f'{type(e).__name__}: {e}')
    news.put(lambda: on_level(result))
    return result

  with concurrent.futures.ThreadPoolExecutor(lanes, 'evaluation') as pool:
    futures = [pool.submit(lane, task_id) for task_id in tasks]
    try:
      while not all(f.done() for f in futures):
        if should_stop():
          stop.set()
        for call in _drain(news, timeout=0.1):
          call()
    finally:
      stop.set()  # An exception here (Ctrl-C, say) waits for the lanes to close.
  for call in _drain(news, timeout=0.0):
    call()
  return [f.result() for f in futures]


def _drain(
  news: queue.SimpleQueue[Callable[[], None]], timeout: float
) -> Iterator[Callable[[], None]]:
  """What is in the queue; waits at most `timeout` seconds, for the first alone."""
  try:
    yield news.get(timeout=timeout) if timeout else news.get_nowait()
    while True:
      yield news.get_nowait()
  except queue.Empty:
    return


def _shares(episodes: int, width: int) -> list[int]:
  return [episodes // width + (i < episodes % width) for i in range(width)]


def _level_seed(seed: int, task_id: int) -> int:
  return int(np.random.SeedSequence([seed, task_id]).generate_state(1)[0]) % 2**31

"""Films of play, as MP4 files."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from impala_jax import components, types
from impala_jax.environments import registry
from impala_jax.evaluation import playing
from impala_jax.runtime import files

_STEPS = 2_700  # Three minutes of play at 15 agent steps a second.


class VideoWriter:
  """Writes frames as MP4, magnified to be looked at; aside, then renamed.

  Args:
    path: of the file.
    fps: frames a second.
  """

  def __init__(self, path: pathlib.Path, fps: float):
    self._path = path
    self._aside = path.with_name(f'.aside-{path.name}')
    self._fps = fps
    self._writer: Any = None

  def add(self, frame: np.ndarray | None) -> None:
    """Appends uint8 [H, W, 3]; None is left out."""
    if frame is None:
      return
    if self._writer is None:
      import imageio_ffmpeg

      height, width = frame.shape[:2]
      factor = max(1, round(480 / height))
      self._writer = imageio_ffmpeg.write_frames(
        # Of 'a:b/film.mp4' it would take a for a protocol.
        str(self._aside.absolute()),
        (width, height),
        fps=self._fps,
        macro_block_size=1,
        output_params=[
          '-vf',
          f'scale={2 * (factor * width // 2)}:{2 * (factor * height // 2)}'
          ':flags=neighbor',
        ],
        ffmpeg_log_level='error',
      )
      self._writer.send(None)
    self._writer.send(np.ascontiguousarray(frame))

  def close(self) -> bool:
    """Finishes the file; False where there was no frame."""
    if self._writer is None:
      return False
    self._writer.close()
    self._aside.replace(self._path)
    return True


def path_for(directory: pathlib.Path, level: str) -> pathlib.Path:
  """Where the film of `level` belongs; names of levels may hold slashes."""
  return directory / f'evaluation_{files.as_name(level, 100)}.mp4'


def film(
  parts: components.Components,
  params: types.Nest,
  level: str,
  directory: pathlib.Path,
  *,
  seed: int,
  greedy: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> pathlib.Path | None:
  """Films one episode of `level`, or its first three minutes.

  Args:
    parts: of the run.
    params: of its agent.
    level: one of the configured levels.
    directory: gets the file, which has the name of the version that is played.
    seed: of the environment and the sampling.
    greedy: take the likeliest action instead of sampling one.
    should_stop: ends the film early.

  Returns:
    The file; None where the suite has no pictures for people.

  Raises:
    base.EngineError, TimeoutError: see `playing.play`.
  """
  scene = parts.make_scene(level)
  if scene is None:
    return None
  suite = parts.config.environment.suite
  path = path_for(directory, registry.reference(suite, level).name)
  writer = VideoWriter(path, 60.0 / parts.config.action_repeat)
  try:
    playing.play(
      parts.agent,
      params,
      scene,
      seed=seed,
      greedy=greedy,
      should_stop=should_stop,
      on_step=lambda: writer.add(scene.frame()),
      max_steps=_STEPS,
    )
  finally:
    scene.close()
    written = writer.close()
  return path if written else None

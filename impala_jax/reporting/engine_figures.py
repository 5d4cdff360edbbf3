"""What the engines of environments do, from the counts that actors report."""

from collections.abc import Mapping

from impala_jax.distributed.control import protocol

_COUNTS = (
  'resets',
  'reset_seconds',
  'cache_hits',
  'cache_misses',
  'cache_evictions',
  'cache_unwritable',
)


class EngineFigures:
  """Figures between one look and the next. Empty for a run without engines."""

  def __init__(self) -> None:
    self._before = (0.0, 0.0)  # Resets, and their seconds.
    self._reset_seconds: float | None = None

  def update(self, control: protocol.Control) -> dict[str, float]:
    """Figures of all engines together, see `record.ENGINES`."""
    total = {name: control.total('actor', f'engines/{name}') for name in _COUNTS}
    asked = total['cache_hits'] + total['cache_misses']
    if not total['resets'] and not asked and not total['cache_unwritable']:
      return {}
    resets, seconds = total['resets'] - self._before[0], total['reset_seconds']
    if resets > 0:  # Else none has ended since; the last word stands.
      self._reset_seconds = (seconds - self._before[1]) / resets
      self._before = total['resets'], seconds
    found = {'resets': total['resets']}
    if self._reset_seconds is not None:
      found['reset_seconds'] = self._reset_seconds
    if asked:
      found['cache_hit_rate'] = total['cache_hits'] / asked
    if asked or total['cache_unwritable']:
      found |= {
        'cache_misses': total['cache_misses'],
        'cache_evictions': total['cache_evictions'],
        'cache_unwritable': total['cache_unwritable'],
      }
    return found


def describe(record: Mapping[str, float]) -> str:
  """For people; empty for a run without engines."""
  words = []
  if (seconds := record.get('engines/reset_seconds')) is not None:
    words.append(f'{seconds:.1f} s to begin an episode')
  if (rate := record.get('engines/cache_hit_rate')) is not None:
    words.append(
      f'level cache had {rate:.0%} of the maps, '
      f'{record["engines/cache_misses"]:,.0f} were compiled'
    )
  if removed := record.get('engines/cache_evictions'):
    words.append(f'the level cache is full: {removed:,.0f} maps removed again')
  if engines := record.get('engines/cache_unwritable'):
    words.append(f'THE LEVEL CACHE CANNOT BE WRITTEN by {engines:,.0f} engines')
  return ', '.join(words)

"""What inference servers do, from the counts that they report."""

from collections.abc import Mapping

from impala_jax.distributed.control import protocol

_COUNTS = ('requests', 'rows', 'batches', 'padding', 'waited', 'refused')


class InferenceFigures:
  """Figures between one look and the next. Empty for a run without servers."""

  def __init__(self) -> None:
    self._before = dict.fromkeys(_COUNTS, 0.0)
    self._newest: dict[str, float] = {}
    self._seconds = 0.0

  def update(self, control: protocol.Control, seconds: float) -> dict[str, float]:
    """Figures of all servers together, see `record.INFERENCE`.

    Args:
      control: what they report to.
      seconds: since the last call.
    """
    self._seconds += seconds
    servers = [p for p, _ in control.peers() if p.role == 'inference']
    if not servers:
      return {}
    total = {name: control.total('inference', name) for name in _COUNTS}
    now = {name: total[name] - self._before[name] for name in _COUNTS}
    present = [p.gauges for p in servers if not p.left]
    if now['batches'] > 0:  # Else none has reported since; the last word stands.
      self._before = total
      self._newest = _rates(now, self._seconds)
      self._seconds = 0.0
    return {
      **self._newest,
      'clients': sum(g.get('clients', 0.0) for g in present),
      'environments': sum(g.get('environments', 0.0) for g in present),
      'refused': total['refused'],
    }


def _rates(counts: Mapping[str, float], seconds: float) -> dict[str, float]:
  requests = max(counts['requests'], 1.0)
  return {
    'requests_per_second': counts['requests'] / max(seconds, 1e-9),
    'rows_per_second': counts['rows'] / max(seconds, 1e-9),
    'batch_mean': counts['rows'] / counts['batches'],
    'padding': counts['padding'] / max(counts['rows'] + counts['padding'], 1.0),
    'wait_ms': 1e3 * counts['waited'] / requests,
  }


def describe(record: Mapping[str, float]) -> str:
  """For people; empty for a run without servers, or before the first requests."""
  if 'inference/requests_per_second' not in record:
    return ''
  words = (
    '{inference/requests_per_second:,.0f} requests/s of {inference/clients:.0f} '
    'actors, batches of {inference/batch_mean:.1f}, {inference/wait_ms:.1f} ms of '
    'waiting each'
  )
  if record['inference/refused']:
    words += ', {inference/refused:.0f} refused'
  return words.format_map(record)

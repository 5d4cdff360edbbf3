"""Reports as bytes (msgpack), and the door at which those that arrive are judged.

Behind it nothing is checked again: sizes, types, numbers that are finite, levels and
processes that the run has.
"""

import functools
import reprlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgpack

from impala_jax.distributed.control import protocol

_KINDS: dict[str, Callable[..., protocol.Event]] = {
  'episode': protocol.Episode,
  'environment_failure': protocol.EnvironmentFailure,
  'evaluation': protocol.Evaluation,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
LARGEST = 4 << 20  # Bytes of one message.
MOST_EVENTS = 1000  # Of one report; who has more makes several reports.
_MOST_NAMES = 100  # Of totals, and of gauges.
_LONGEST_NAME = 100  # Letters.
_LONGEST_TEXT = 1000  # Letters of a cause.
_MOST_ITEMS = 100_000  # Of one list or map.
_END = 2**63  # Of numbers: sums of them stay finite.
_T = TypeVar('_T')


class Refused(ValueError):
  """A message that makes no sense: names the field, the value and what is allowed."""

  def __init__(self, field: str, value: Any, allowed: str):
    super().__init__(field, value, allowed)
    self.field, self.value, self.allowed = field, value, allowed

  def __str__(self) -> str:
    return f'{self.field} is {reprlib.repr(self.value)}: must be {self.allowed}'


def plain(event: protocol.Event) -> dict[str, Any]:
  """What JSON and msgpack can hold, with the `kind` of the event."""
  return {'kind': _NAMES[type(event)], **vars(event)}


def pack(report: protocol.Report) -> bytes:
  """Bytes of a report of at most `MOST_EVENTS` events; their long texts are cut."""
  message = {**vars(report), 'events': [_cut(plain(e)) for e in report.events]}
  return bytes(msgpack.packb(message))


def unpack(
  packed: bytes,
  levels: Sequence[str],
  processes: Mapping[protocol.Role, range] | None = None,
) -> tuple[protocol.Report, list[Refused]]:
  """What `pack` made, with the events that were refused: they do not harm the others.

  Args:
    packed: by whomsoever.
    levels: of the run.
    processes: see `protocol.Control`; None for any.

  Raises:
    Refused: the report is none.
  """
  message = _unpack_map(packed, 'report')
  events = message.pop('events', None)
  if not isinstance(events, list) or len(events) > MOST_EVENTS:
    raise Refused('report.events', events, f'a list of at most {MOST_EVENTS}')
  sound: list[protocol.Event] = []
  refused = []
  for event in events:
    try:
      sound.append(_event(event, levels))
    except Refused as e:
      refused.append(e)
  report = _read(protocol.Report, message, 'report', events=sound)
  for field, numbers in (('totals', report.totals), ('gauges', report.gauges)):
    if len(numbers) > _MOST_NAMES:
      allowed = f'of at most {_MOST_NAMES} names'
      raise Refused(f'report.{field}', numbers, allowed)
  known = (processes or {}).get(report.role)
  # Actors come and go.
  if report.role != 'actor' and known is not None and report.index not in known:
    whose = f"one of the run's {report.role} processes"
    raise Refused(f'report.index of role {report.role}', report.index, whose)
  return report, refused


def pack_fetch(have_version: int, of: str) -> bytes:
  return bytes(msgpack.packb({'have_version': int(have_version), 'of': of}))


def unpack_fetch(packed: bytes) -> tuple[int, str]:
  """What `pack_fetch` made; raises Refused where it is nothing of the kind."""
  message = _unpack_map(packed, 'fetch')
  version, of = message.get('have_version'), message.get('of')
  if type(version) is not int or not isinstance(of, str):
    raise Refused('fetch', message, 'a version and the identity of its learner')
  return version, of


def _cut(value: Any) -> Any:
  """`value` with no text in it that would be refused for its length."""
  if isinstance(value, dict):
    return {k: _cut(v) for k, v in value.items()}
  return value[:_LONGEST_TEXT] if isinstance(value, str) else value


def _unpack_map(packed: bytes, name: str) -> dict[Any, Any]:
  if len(packed) > LARGEST:
    raise Refused(f'size of {name}', len(packed), f'at most {LARGEST} bytes')
  try:
    message = msgpack.unpackb(
      packed, max_array_len=_MOST_ITEMS, max_map_len=_MOST_ITEMS, max_ext_len=0
    )
  except Exception:  # Of many kinds.
    raise Refused(name, packed, 'msgpack') from None
  if not isinstance(message, dict):
    raise Refused(name, message, 'a map')
  return message


def _event(message: Any, levels: Sequence[str]) -> protocol.Event:
  if not isinstance(message, dict):
    raise Refused('event', message, 'a map')
  name = message.pop('kind', None)
  if not isinstance(name, str) or name not in _KINDS:
    raise Refused('event.kind', name, f'one of {", ".join(_KINDS)}')
  event = _read(_KINDS[name], message, name)
  if isinstance(event, protocol.Evaluation):
    if unknown := event.means.keys() - set(levels):
      raise Refused('evaluation.means', [*unknown], 'of levels of the run')
  elif event.task_id >= len(levels):
    raise Refused(f'{name}.task_id', event.task_id, f'below {len(levels)}')
  return event


def _read(
  kind: Callable[..., _T], message: Mapping[Any, Any], name: str, **known: Any
) -> _T:
  """Checks all fields of a dataclass but those that are known."""
  checks = _checks(kind)
  if message.keys() != checks.keys() - known.keys():
    raise Refused(f'fields of {name}', [*message], ', '.join(checks))
  for field, value in message.items():
    try:
      known[field] = checks[field](value)
    except Refused as e:
      raise Refused(f'{name}.{field}{e.field}', e.value, e.allowed) from None
  return kind(**known)


@functools.cache
def _checks(kind: Callable[..., Any]) -> dict[str, Callable[[Any], Any]]:
  return {field: _check(hint) for field, hint in typing.get_type_hints(kind).items()}


def _check(hint: Any) -> Callable[[Any], Any]:
  """A function that returns a value of the type, or raises `Refused`."""
  kind, of = typing.get_origin(hint) or hint, typing.get_args(hint)
  if kind is int:
    return _whole
  if kind is float:
    return _number
  if kind is typing.Literal:
    return functools.partial(_one_of, of)
  if kind is list:
    return functools.partial(_list, _check(of[0]))
  if issubclass(kind, Mapping):
    return functools.partial(_map, _check(of[1]))
  return functools.partial(_plain, kind)


def _whole(value: Any) -> int:
  if type(value) is int and 0 <= value < _END:  # True is none.
    return value
  raise Refused('', value, 'a whole number in [0, 2^63)')


def _number(value: Any) -> float:
  if type(value) in (int, float) and abs(value) < _END:
    return float(value)
  raise Refused('', value, 'a number below 2^63 in size')


def _one_of(allowed: tuple[str, ...], value: Any) -> str:
  if value in allowed:
    return str(value)
  raise Refused('', value, f'one of {", ".join(allowed)}')


def _list(check: Callable[[Any], Any], value: Any) -> list[Any]:
  if isinstance(value, list):
    return [check(v) for v in value]
  raise Refused('', value, 'a list')


def _map(check: Callable[[Any], Any], value: Any) -> dict[str, Any]:
  if not isinstance(value, dict) or not all(map(_is_name, value)):
    raise Refused('', value, f'a map with names of at most {_LONGEST_NAME} letters')
  try:
    return {(at := k): check(v) for k, v in value.items()}
  except Refused as e:
    raise Refused(f'[{at!r:.40}]', e.value, e.allowed) from None


def _is_name(value: Any) -> bool:
  return isinstance(value, str) and len(value) <= _LONGEST_NAME


def _plain(kind: type, value: Any) -> Any:
  if isinstance(value, str) and len(value) > _LONGEST_TEXT:
    raise Refused('', value, f'of at most {_LONGEST_TEXT} letters')
  if isinstance(value, kind):
    return value
  raise Refused('', value, f'of type {kind.__name__}')

"""Tests marked `unsteady(reason)`: one that fails runs once more, and is named.

More than two of them in a run fail the run: by then it is not the machine.
"""

import pytest
from _pytest import runner

_MOST = 2
_PROPERTY = 'unsteady'
_failures: list[str] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
  mark = item.get_closest_marker('unsteady')
  if mark is None:
    return None
  (reason,) = mark.args
  item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
  reports = runner.runtestprotocol(item, log=False, nextitem=nextitem)
  failed = [r for r in reports if r.failed]
  if failed:
    reports = runner.runtestprotocol(item, log=False, nextitem=nextitem)
    last = str(failed[0].longrepr).strip().splitlines()[-1]
    line = f'{item.nodeid}: {last}\n  {reason}'
    reports[0].user_properties = [*reports[0].user_properties, (_PROPERTY, line)]
  for report in reports:
    item.ihook.pytest_runtest_logreport(report=report)
  item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
  return True


def pytest_runtest_logreport(report):
  _failures.extend(value for name, value in report.user_properties if name == _PROPERTY)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
  if len(_failures) > _MOST and session.exitstatus == pytest.ExitCode.OK:
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
  if _failures:
    terminalreporter.section(f'unsteady tests that failed once (at most {_MOST})')
    for line in _failures:
      terminalreporter.line(line)

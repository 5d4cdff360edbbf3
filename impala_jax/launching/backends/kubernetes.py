"""Kubernetes: a JobSet of the learners, an Indexed Job of the actors, the evaluator.

`kubernetes_objects` says what the objects are. Submitting and the rest go through
`kubectl`. The run directory is a volume in the cluster; the one here holds
`launch.json` and `config.json`.
"""

import dataclasses
import json
import pathlib
from typing import Any

import yaml

from impala_jax.launching import program as program_lib
from impala_jax.launching.backends import backend, kubernetes_objects, kubernetes_pods
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory

Options = kubernetes_pods.Options
_STATES = {'Succeeded': 'done', 'Failed': 'failed', 'Running': 'running'}
_DELETE_TIMEOUT = 90.0
# What a stopped run leaves behind: its checkpoints.
_KEPT = ('PersistentVolumeClaim',)


class Kubernetes(backend.Backend):
  """See the module; `options` are `Options`."""

  name = 'kubernetes'
  keeps_elsewhere = True
  options: Options

  def render(self, program: program_lib.Program) -> dict[str, str]:
    if problems := kubernetes_objects.problems(program):
      raise backend.BackendError('\n'.join(problems))
    objects = kubernetes_objects.objects(program, self.options)
    return {
      f'{i}-{name}.yaml': yaml.safe_dump(item, sort_keys=False)
      for i, (name, item) in enumerate(objects.items())
    }

  def commands(self, program: program_lib.Program) -> list[list[str]]:
    folder = RunDirectory(pathlib.Path(program.run_dir)).launch_files
    return [self._kubectl('apply', '-f', str(folder / f)) for f in self.render(program)]

  def submit(self, program: program_lib.Program) -> backend.Launch:
    texts = self.render(program)
    names = [_name(text) for text in texts.values()]
    before = self._launch_before(program)
    known = self._present(names, program)
    if before is not None:
      known |= set(before.handles['objects'])
    words: dict[str, str] = {}  # kubectl's on each object, empty where it failed.
    try:
      self.write_files(program, texts)
      for name, command in zip(names, self.commands(program), strict=True):
        words[name] = ''
        words[name] = backend.run_command(command).strip()
      return self.new_launch(program, {'objects': names})
    except BaseException as e:
      undone = self._undo(words, known, before)
      if isinstance(e, backend.BackendError):
        raise backend.BackendError(f'{e} ({undone})') from e
      raise

  def status(self, launch: backend.Launch) -> list[backend.Task]:
    selector = f'{kubernetes_pods.RUN_LABEL}={launch.program.name}'
    text = backend.run_command(
      self._kubectl('get', 'pods', '-l', selector, '-o', 'json')
    )
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for pod in json.loads(text)['items']:
      meta = pod['metadata']
      index = int(meta.get('annotations', {}).get(kubernetes_pods.INDEX, 0))
      key = (meta['labels'][kubernetes_pods.ROLE_LABEL], index)
      if (
        key not in newest
        or meta['creationTimestamp'] >= (newest[key]['metadata']['creationTimestamp'])
      ):
        newest[key] = pod
    tasks = []
    for role in launch.program.roles:
      for index in range(role.replicas):
        pod = newest.get((role.name, index))
        if pod is None:
          tasks.append(backend.Task(role.name, index, 'pending', '', 'no pod yet'))
          continue
        phase = pod['status'].get('phase', 'Pending')
        words = f'pod {pod["metadata"]["name"]} {phase.lower()}'
        if reason := _reason(pod):
          words += f' ({reason})'
        tasks.append(
          backend.Task(
            role.name,
            index,
            _STATES.get(phase, 'pending'),
            pod['spec'].get('nodeName', ''),
            words,
          )
        )
    return tasks

  def scale(self, launch: backend.Launch, role: str, replicas: int) -> str:
    before = launch.program.role(role).replicas
    program = launch.program.scaled(role, replicas)
    if problems := kubernetes_objects.problems(program):
      raise backend.BackendError('\n'.join(problems))
    self._resize(program, role, replicas)
    try:
      dataclasses.replace(launch, program=program).write()
    except BaseException:
      self._resize(program, role, before)
      raise
    launch.program = program
    return f'{role}: {before} -> {replicas}'

  def stop(self, launch: backend.Launch) -> str:
    names = launch.handles['objects']
    learner = [n for n in names if n.startswith('JobSet/')]
    grace = launch.program.role('learner').grace
    self._delete(learner, grace + _DELETE_TIMEOUT)
    rest = [n for n in names if n.split('/')[0] not in _KEPT and n not in learner]
    self._delete(rest, _DELETE_TIMEOUT)
    kept = [n for n in names if n.split('/')[0] in _KEPT]
    launch.handles['objects'] = kept
    launch.write()
    return 'stopped' + (f'; kept {", ".join(kept)}' if kept else '')

  def log(self, launch: backend.Launch, role: str, index: int, lines: int) -> str:
    path = RunDirectory(pathlib.Path(kubernetes_pods.RUN_DIR)).log(role, index)
    return self._in_learner(launch, 'tail', '-n', str(lines), str(path))

  def run_file(self, launch: backend.Launch, name: str) -> str:
    """Text of a file of the run directory in the cluster."""
    return self._in_learner(launch, 'cat', f'{kubernetes_pods.RUN_DIR}/{name}')

  def _in_learner(self, launch: backend.Launch, *command: str) -> str:
    selector = (
      f'{kubernetes_pods.RUN_LABEL}={launch.program.name},'
      f'{kubernetes_pods.ROLE_LABEL}=learner'
    )
    pods = backend.run_command(
        self._kubectl('get', 'pods', '-l', selector, '-o', 'name',
                      '--field-selector=status.phase=Running')
    ).split()  # fmt: skip
    if not pods:
      raise backend.BackendError(
        'no learner pod is running: its volume is out of reach'
      )
    return backend.run_command(self._kubectl('exec', pods[0], '--', *command))

  def _kubectl(self, *arguments: str) -> list[str]:
    options = self.options
    context = [f'--context={options.context}'] if options.context else []
    return ['kubectl', *context, f'--namespace={options.namespace}', *arguments]

  def _resize(self, program: program_lib.Program, role: str, replicas: int) -> None:
    # An Indexed Job is elastic where both change together.
    patch = json.dumps({'spec': {'parallelism': replicas, 'completions': replicas}})
    job = f'job/{program.name}-{role}'
    backend.run_command(self._kubectl('patch', job, '--type=merge', '-p', patch))

  def _delete(self, names: list[str], timeout: float) -> None:
    if not names:
      return
    wait = [f'--timeout={timeout:.0f}s'] if timeout else ['--wait=false']
    command = self._kubectl('delete', '--ignore-not-found', *wait, *names)
    backend.run_command(command, timeout=timeout + backend.COMMAND_TIMEOUT)

  def _launch_before(self, program: program_lib.Program) -> backend.Launch | None:
    """The launch with which a run goes on: that which has its volume.

    Raises:
      BackendError: what there is of the run has another name or is elsewhere.
    """
    run = RunDirectory(pathlib.Path(program.run_dir))
    launch = files.read_json(run.launch)
    if launch.get('launcher') != self.name:
      return None
    options = launch['options']
    was = (launch['program']['name'], options['namespace'], options['claim'])
    now = (program.name, self.options.namespace, self.options.claim)
    if was != now:
      place = 'run {0}, namespace {1}, claim {2!r}'
      raise backend.BackendError(
        f'the checkpoints are in the volume of {place.format(*was)}, not of '
        f'{place.format(*now)}: submit it as it was, with {{"name": "{was[0]}"}} in '
        f'{run.run_name} if no other run has that name; or remove {run.launch} to '
        'begin without them'
      )
    return backend.read_launch(run.path)

  def _present(self, names: list[str], program: program_lib.Program) -> set[str]:
    """Those of the objects that are in the cluster already.

    Raises:
      BackendError: one of them is not of this run.
    """
    command = self._kubectl('get', '--ignore-not-found', '--output=json', *names)
    text = backend.run_command(command)
    found = json.loads(text) if text.strip() else {'items': []}
    present = set()
    for item in found.get('items', [found]):
      name = f'{item["kind"]}/{item["metadata"]["name"]}'
      owner = item['metadata'].get('labels', {}).get(kubernetes_pods.RUN_LABEL)
      if owner != program.name:
        raise backend.BackendError(
          f'{name} is in the cluster and belongs to {owner or "somebody else"}, not to '
          f'{program.name}: nothing was changed'
        )
      present.add(name)
    return present

  def _undo(
    self, words: dict[str, str], known: set[str], before: backend.Launch | None
  ) -> str:
    """Takes back what one call of `submit` did; says what, and what is left.

    Args:
      words: kubectl's on each object that it tried, the last one first to go.
      known: objects that were there, as far as the cluster and `before` say.
      before: the launch before that call, whose objects get their state back.
    """
    made = [
      name
      for name, word in reversed(words.items())
      if word.endswith(' created') or not (word or name in known)
    ]
    changed = [n for n in words if n not in made and not words[n].endswith('unchanged')]
    # No claim, even a new one: what is in a volume is for people to delete.
    left = [n for n in made if n.split('/')[0] in _KEPT]
    gone = [n for n in made if n not in left]
    done = []
    for names, act, word in (
      (gone, lambda: self._delete(gone, 0.0), 'deleted'),
      (changed, lambda: self._apply_again(before, changed), 'changed back'),
    ):
      try:
        act()
        done += [f'{word} {", ".join(names)}'] if names else []
      except (backend.BackendError, TypeError):  # Or options of another version.
        left += names
    done += [f'left as they are {", ".join(left)}'] if left else []
    return '; '.join(done) or 'nothing was changed'

  def _apply_again(self, launch: backend.Launch | None, names: list[str]) -> None:
    """Gives objects the state that they had with a launch."""
    if launch is None:
      raise backend.BackendError('their state is not known')
    then = Kubernetes(Options(**launch.options))
    texts = then.render(launch.program)
    self.write_files(launch.program, texts)
    for text, command in zip(
      texts.values(), then.commands(launch.program), strict=True
    ):
      if _name(text) in names:
        backend.run_command(command)


def _name(text: str) -> str:
  """As kubectl takes it, of an object that was rendered."""
  item = yaml.safe_load(text)
  return f'{item["kind"]}/{item["metadata"]["name"]}'


def _reason(pod: dict[str, Any]) -> str:
  """Why a pod waits or ended, in the cluster's words."""
  status = pod['status']
  for container in status.get('containerStatuses', []):
    for state in container.get('state', {}).values():
      if state.get('reason'):
        return f'{state["reason"]} {state.get("message", "")}'.strip()
  return status.get('reason', '')

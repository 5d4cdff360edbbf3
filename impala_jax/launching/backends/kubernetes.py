"""Kubernetes: a JobSet of the learners, an Indexed Job of the actors, the evaluator.

`kubernetes_objects` says what the objects are. Submitting and the rest go through
`kubectl`. The run directory is a volume in the cluster; the one here holds
`launch.json` and `config.json`.
"""

import json
import pathlib
from typing import Any

import yaml

from impala_jax.launching import program as program_lib
from impala_jax.launching.backends import backend, kubernetes_objects, kubernetes_pods
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
    files = self.render(program)
    self.write_files(program, files)
    objects = [yaml.safe_load(text) for text in files.values()]
    handles = {'objects': [f'{o["kind"]}/{o["metadata"]["name"]}' for o in objects]}
    try:
      for command in self.commands(program):
        backend.run_command(command)
    except backend.BackendError as e:
      self._delete(handles['objects'], 0.0, suppress=True)
      raise backend.BackendError(f'{e} (what had been made was deleted)') from e
    return self.new_launch(program, handles)

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
    # An Indexed Job is elastic where both change together.
    patch = json.dumps({'spec': {'parallelism': replicas, 'completions': replicas}})
    job = f'job/{program.name}-{role}'
    backend.run_command(self._kubectl('patch', job, '--type=merge', '-p', patch))
    launch.program = program
    launch.write()
    return f'{role}: {before} -> {replicas}'

  def stop(self, launch: backend.Launch) -> str:
    names = launch.handles['objects']
    learner = [n for n in names if n.startswith('JobSet/')]
    grace = launch.program.role('learner').grace
    self._delete(learner, grace + _DELETE_TIMEOUT)
    rest = [n for n in names if n.split('/')[0] not in _KEPT and n not in learner]
    self._delete(rest, _DELETE_TIMEOUT)
    kept = [n for n in names if n.split('/')[0] in _KEPT]
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

  def _delete(self, names: list[str], timeout: float, suppress: bool = False) -> None:
    wait = [f'--timeout={timeout:.0f}s'] if timeout else ['--wait=false']
    command = self._kubectl('delete', '--ignore-not-found', *wait, *names)
    try:
      backend.run_command(command, timeout=timeout + backend.COMMAND_TIMEOUT)
    except backend.BackendError:
      if not suppress:
        raise


def _reason(pod: dict[str, Any]) -> str:
  """Why a pod waits or ended, in the cluster's words."""
  status = pod['status']
  for container in status.get('containerStatuses', []):
    for state in container.get('state', {}).values():
      if state.get('reason'):
        return f'{state["reason"]} {state.get("message", "")}'.strip()
  return status.get('reason', '')

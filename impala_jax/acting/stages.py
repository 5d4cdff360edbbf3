"""What an actor's time is spent on."""

STAGES = {
  'environment': 'stepping environments',
  'inference': 'running the policy',
  'pack': 'writing unrolls',
  'learner': 'waiting for a place in the queue',
  'parameters': 'fetching parameters',
  'other': 'in no stage that is measured',
}

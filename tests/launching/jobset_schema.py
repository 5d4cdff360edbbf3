"""What a JobSet (jobset.x-k8s.io/v1alpha2) may hold, as far as this project uses it.

A JSON schema written for these tests, strict: a field that is not named here is an
error. The Jobs inside are checked by Kubernetes' own schema.
"""

_NAME = {'type': 'string', 'pattern': '^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$'}


def _object(required, **properties):
  return {
    'type': 'object',
    'properties': properties,
    'required': required,
    'additionalProperties': False,
  }


_METADATA = _object(
  ['name', 'namespace', 'labels'],
  name=_NAME,
  namespace=_NAME,
  labels={'type': 'object', 'additionalProperties': {'type': 'string'}},
)
_NETWORK = _object(
  [],
  enableDNSHostnames={'type': 'boolean'},
  subdomain=_NAME,
  publishNotReadyAddresses={'type': 'boolean'},
)
_RULE = _object(
  ['action'],
  name={'type': 'string', 'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
  action={'enum': ['FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts']},
  onJobFailureReasons={
    'type': 'array',
    'items': {
      'enum': [
        'BackoffLimitExceeded',
        'DeadlineExceeded',
        'FailedIndexes',
        'MaxFailedIndexesExceeded',
        'PodFailurePolicy',
      ]
    },
  },
  targetReplicatedJobs={'type': 'array', 'items': _NAME},
)
_FAILURE_POLICY = _object(
  [],
  maxRestarts={'type': 'integer', 'minimum': 0},
  restartStrategy={'enum': ['Recreate', 'BlockingRecreate']},
  rules={'type': 'array', 'items': _RULE, 'maxItems': 20},
)
_REPLICATED_JOB = _object(
  ['name', 'template'],
  name=_NAME,
  replicas={'type': 'integer', 'minimum': 0},
  template=_object(
    ['spec'],
    metadata=_object([], labels=_METADATA['properties']['labels']),
    spec={'type': 'object'},
  ),
)
JOB_SET = _object(
  ['apiVersion', 'kind', 'metadata', 'spec'],
  apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'},
  kind={'const': 'JobSet'},
  metadata=_METADATA,
  spec=_object(
    ['replicatedJobs'],
    network=_NETWORK,
    failurePolicy=_FAILURE_POLICY,
    replicatedJobs={'type': 'array', 'minItems': 1, 'items': _REPLICATED_JOB},
  ),
)

"""The IMPALA network: torso, inputs joined to it, LSTM core, heads."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from impala_jax import types
from impala_jax.agents import frame_stack as frame_stacks
from impala_jax.agents import instructions as texts
from impala_jax.agents import lstm as cores


class ImpalaNetwork(nn.Module):
  """Policy and value of an observation that is an array or a dict.

  A dict holds 'frame' and, for `instructions`, 'instruction' (int32 [L], see
  `environments.instruction_ids`); other entries are ignored.

  The recurrent state is a dict of what there is: 'frames' (see `frame_stack`) and
  'lstm' ((h, c), float32 [B, lstm] each); `()` where there is neither. It is reset
  before every FIRST step.

  Attributes:
    num_actions: A.
    torso: maps [N, *frame shape] -> [N, D]; images have C * frame_stack channels.
    lstm: units of the core, 0 for none.
    frame_stack: frames the torso sees at once; above 1 for images only.
    last_action_reward: join the last action (one-hot) and the last reward, clipped
      to [-1, 1]; zeros on FIRST steps.
    instructions: join the encoding of the instruction.
  """

  num_actions: int
  torso: nn.Module
  lstm: int = 0
  frame_stack: int = 1
  last_action_reward: bool = False
  instructions: bool = False

  def initial_state(self, batch_size: int, spec: types.EnvironmentSpec) -> types.Nest:
    """State before the first step of `batch_size` environments."""
    state: dict[str, types.Nest] = {}
    if self.frame_stack > 1:
      frame = _frame(spec.observation)
      self._check_stackable(frame.shape)
      state['frames'] = frame_stacks.initial(batch_size, frame, self.frame_stack)
    if self.lstm:
      state['lstm'] = cores.zero_state(batch_size, self.lstm)
    return state or ()

  @nn.compact
  def __call__(
    self, timestep: types.TimeStep, last_action: types.Array, state: types.Nest
  ) -> tuple[types.AgentOutput, types.Nest]:
    """Unrolls over time.

    Args:
      timestep: leaves [T, B, ...].
      last_action: int32 [T, B], the action that led to `timestep`; ignored on FIRST
        steps, as is the reward.
      state: leaves [B, ...], before timestep[0] was seen.

    Returns:
      Output [T, B, ...] and the state after the last step.

    Raises:
      ValueError: at trace time, where the observation does not suit the attributes.
    """
    first = timestep.step_type == types.StepType.FIRST
    steps, batch = first.shape
    new_state: dict[str, types.Nest] = {}

    frame = _frame(timestep.observation)
    if self.frame_stack > 1:
      self._check_stackable(frame.shape[2:])
      frame, new_state['frames'] = frame_stacks.stack(
        frame, first, state['frames'], self.frame_stack
      )
    encoded = self.torso(frame.reshape(steps * batch, *frame.shape[2:]))
    if encoded.ndim != 2 or encoded.shape[0] != steps * batch:
      raise ValueError(
        f'torso {type(self.torso).__name__} gave an array {list(encoded.shape)} for '
        f'{steps * batch} observations: must be [{steps * batch}, D]'
      )
    joined = [encoded.astype(jnp.float32).reshape(steps, batch, -1)]

    if self.last_action_reward:
      # one_hot(-1) is all zeros.
      action = jnp.where(first, -1, last_action)
      joined.append(jax.nn.one_hot(action, self.num_actions))
      reward = jnp.where(first, 0.0, timestep.reward)
      joined.append(jnp.clip(reward, -1.0, 1.0)[..., None])
    if self.instructions:
      ids = _instruction(timestep.observation)
      encoder = texts.InstructionEncoder(name='instruction')
      text = encoder(ids.reshape(steps * batch, -1))
      joined.append(text.reshape(steps, batch, -1))
    x = jnp.concatenate(joined, axis=-1)

    if self.lstm:
      x, new_state['lstm'] = cores.LSTM(self.lstm, name='lstm')(
        x, state['lstm'], reset=first
      )

    # Nearly uniform at the start, so that no action is favoured by chance.
    policy_init = nn.initializers.orthogonal(0.01)
    logits = nn.Dense(self.num_actions, kernel_init=policy_init, name='policy')(x)
    value_init = nn.initializers.orthogonal(1.0)
    baseline = nn.Dense(1, kernel_init=value_init, name='baseline')(x)
    return types.AgentOutput(logits, baseline[..., 0]), new_state or ()

  def _check_stackable(self, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
      raise ValueError(
        f'frame_stack is {self.frame_stack}: must be 1 for observations that are not '
        f'images [H, W, C]; this one is {list(shape)}'
      )


def _frame(observation: types.Nest) -> types.Nest:
  if not isinstance(observation, Mapping):
    return observation
  if 'frame' not in observation:
    raise ValueError(
      f"observation has the entries {sorted(observation)}: a dict needs 'frame' "
      "(and may have 'instruction'), or write a network of your own"
    )
  return observation['frame']


def _instruction(observation: types.Nest) -> types.Array:
  ids = observation.get('instruction') if isinstance(observation, Mapping) else None
  if ids is None or ids.ndim != 3 or not jnp.issubdtype(ids.dtype, jnp.integer):
    found = 'has none' if ids is None else f'has {ids.dtype}{list(ids.shape[2:])}'
    raise ValueError(
      "instructions is True: must be False unless the observation has 'instruction' "
      f'of the form int32 [L]; this one {found}'
    )
  return ids

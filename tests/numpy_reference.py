"""Slow NumPy versions, written from the papers' formulas with one loop per symbol.

All take ONE stretch of one episode (no boundaries inside) in float64: the boundary
rule of the package is tested by computing each stretch apart with these.
"""

import numpy as np


def vtrace(
  log_rhos,
  discounts,
  rewards,
  values,
  bootstrap,
  *,
  rho_clip=1.0,
  c_clip=1.0,
  pg_rho_clip=1.0,
  lambda_=1.0,
  correction='vtrace',
):
  """(vs, pg_advantages), each [T], by the explicit sum of equation (1) of V-trace.

  v_s = V(x_s) + sum_{t=s}^{n-1} (prod_{i=s}^{t-1} gamma_i c_i) delta_t
  """
  n = len(rewards)
  v = [*map(float, values), float(bootstrap)]
  rho, c, pg_rho = [], [], []
  for t in range(n):
    ratio = np.exp(float(log_rhos[t]))
    if correction == 'vtrace':
      rho.append(min(rho_clip, ratio))
      c.append(lambda_ * min(c_clip, ratio))
    else:
      rho.append(1.0)
      c.append(lambda_)
    if correction in ('vtrace', 'one_step_is'):
      pg_rho.append(min(pg_rho_clip, ratio))
    else:
      pg_rho.append(1.0)
  vs = []
  for s in range(n):
    total = v[s]
    for t in range(s, n):
      product = 1.0
      for i in range(s, t):
        product *= discounts[i] * c[i]
      delta = rho[t] * (rewards[t] + discounts[t] * v[t + 1] - v[t])
      total += product * delta
    vs.append(total)
  vs.append(v[n])
  advantages = [
    pg_rho[s] * (rewards[s] + discounts[s] * vs[s + 1] - v[s]) for s in range(n)
  ]
  return np.array(vs[:n]), np.array(advantages)


def clip_reward(reward, kind):
  """One float."""
  if kind == 'abs_one':
    return max(-1.0, min(1.0, reward))
  if kind == 'soft_asymmetric':
    squeezed = np.tanh(reward / 5.0)
    return 5.0 * squeezed if reward >= 0 else 0.3 * 5.0 * squeezed
  return reward


def log_softmax(logits):
  """float64 [A]."""
  shifted = np.asarray(logits, np.float64) - np.max(logits)
  return shifted - np.log(np.sum(np.exp(shifted)))


def times_log(p, log_p):
  """p log p, 0 where p is 0."""
  return p * log_p if p > 0 else 0.0


def loss(logits, baseline, actions, behaviour_log_probs, rewards, not_ended, settings):
  """Loss, its parts and its analytic gradient for one stretch.

  Args:
    logits: [n, A]; baseline: [n + 1]; actions, behaviour_log_probs, rewards (raw),
    not_ended (0 where the episode truly ended with this transition): [n].
    settings: a `config.Loss`.

  Returns:
    dict with 'policy_loss', 'baseline_loss', 'entropy_loss'; 'log_rhos', 'discounts',
    'rewards' (clipped), 'vs', 'advantages', 'entropies', each [n];
    'grad_logits' [n, A], 'grad_baseline' [n + 1].
  """
  n, num_actions = len(actions), logits.shape[1]
  log_pi = [log_softmax(logits[t]) for t in range(n)]
  log_rhos = [log_pi[t][actions[t]] - float(behaviour_log_probs[t]) for t in range(n)]
  discounts = [settings.discount * float(not_ended[t]) for t in range(n)]
  clipped = [clip_reward(float(rewards[t]), settings.reward_clipping) for t in range(n)]
  vs, advantages = vtrace(
    log_rhos,
    discounts,
    clipped,
    baseline[:n],
    baseline[n],
    rho_clip=settings.rho_clip,
    c_clip=settings.c_clip,
    pg_rho_clip=settings.pg_rho_clip,
    lambda_=settings.trace_lambda,
    correction=settings.correction,
  )
  out = {'policy_loss': 0.0, 'baseline_loss': 0.0, 'entropy_loss': 0.0}
  entropies = []
  grad_logits = np.zeros((n, num_actions))
  grad_baseline = np.zeros(n + 1)
  for t in range(n):
    p = np.exp(log_pi[t])
    p_a = p[actions[t]]
    one_hot = np.eye(num_actions)[actions[t]]
    if settings.correction == 'epsilon_correction':
      log_policy, slope = np.log(p_a + 1e-6), p_a / (p_a + 1e-6)
    else:
      log_policy, slope = np.log(p_a), 1.0
    entropy = -sum(times_log(q, log_q) for q, log_q in zip(p, log_pi[t], strict=True))
    entropies.append(entropy)
    error = vs[t] - float(baseline[t])
    out['policy_loss'] -= log_policy * advantages[t]
    out['baseline_loss'] += settings.baseline_cost * 0.5 * error**2
    out['entropy_loss'] -= settings.entropy_cost * entropy
    grad_logits[t] = -advantages[t] * slope * (one_hot - p)
    products = np.array([times_log(*x) for x in zip(p, log_pi[t], strict=True)])
    grad_logits[t] += settings.entropy_cost * (products + p * entropy)
    grad_baseline[t] = -settings.baseline_cost * error
  return {
    **out,
    'log_rhos': np.array(log_rhos),
    'discounts': np.array(discounts),
    'rewards': np.array(clipped),
    'entropies': np.array(entropies),
    'vs': vs,
    'advantages': advantages,
    'grad_logits': grad_logits,
    'grad_baseline': grad_baseline,
  }


def rmsprop(parameters, gradients, rates, *, decay, epsilon, momentum):
  """Parameters after each of `gradients` (list of [N]) with `rates` (list)."""
  x = np.asarray(parameters, np.float64)
  mean_square, velocity = np.ones_like(x), np.zeros_like(x)
  history = []
  for g, rate in zip(gradients, rates, strict=True):
    mean_square = decay * mean_square + (1 - decay) * np.square(g)
    velocity = momentum * velocity + rate * g / np.sqrt(mean_square + epsilon)
    x = x - velocity
    history.append(x)
  return history


def adam(parameters, gradients, rates, *, b1, b2, epsilon):
  """Parameters after each of `gradients` (Kingma & Ba 2015, algorithm 1)."""
  x = np.asarray(parameters, np.float64)
  m, v = np.zeros_like(x), np.zeros_like(x)
  history = []
  for i, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * np.square(g)
    x = x - rate * (m / (1 - b1**i)) / (np.sqrt(v / (1 - b2**i)) + epsilon)
    history.append(x)
  return history

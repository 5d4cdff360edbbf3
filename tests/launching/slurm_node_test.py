"""What a supervisor knows of the job of Slurm that it runs in."""

from impala_jax.launching import slurm_node


def test_a_task_of_an_array_is_not_taken_for_the_whole_array():
  # The last task to start has the number of the array for its own.
  task = {'SLURM_JOB_ID': '7', 'SLURM_ARRAY_JOB_ID': '7', 'SLURM_ARRAY_TASK_ID': '1'}
  assert slurm_node.job(task) == '7_1'
  assert slurm_node.job({'SLURM_JOB_ID': '7'}) == '7'

"""The training loop and what it is made of: tasks, optimizers, schedules, checkpoints, meter and sinks."""

"""The training run: loop, optimizer, schedule, checkpoints, metrics, guard, signals."""

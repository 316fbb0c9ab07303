"""Lightning callbacks and plugins: checkpoints, exact resume, acceptance length, metrics, preemption, strategies."""

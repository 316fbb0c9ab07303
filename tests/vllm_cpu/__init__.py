"""What vLLM needs to run on a CPU in tests."""

from pathlib import Path

from tests import forks

# A server, instead of ``-m vllm.entrypoints...``; engines in one process; and these with Triton's kernels interpreted.
SERVE, RUN, INTERPRETED = (
    (forks.__file__, str(Path(__file__).with_name(name))) for name in ("serve.py", "run.py", "interpreted.py")
)

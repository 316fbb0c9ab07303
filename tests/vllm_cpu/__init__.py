"""What vLLM needs to run on a CPU in tests."""

from pathlib import Path

from tests import forks

SERVE = (forks.__file__, str(Path(__file__).with_name("serve.py")))  # instead of ``-m vllm.entrypoints...``

"""Live comparisons need PyTorch, which users of the package do not: without it there is nothing to collect here."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]

"""Speed and memory, run by hand; nothing here is asserted in tests. See README.md for what was measured."""

"""The command line: one module for each kind of command, and the table that finds them."""

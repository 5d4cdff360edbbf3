"""What a user types: `impala train` and the others, one file a command.

Each has `add_flags(parser)`, `run(args) -> exit code` and a docstring, which its
`--help` shows.
"""

"""One file per command: a `Settings` dataclass that makes the flags, and `run(settings)`; no stage imports another."""

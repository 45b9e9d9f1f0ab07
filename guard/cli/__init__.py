"""The command line: `guard fit | inspect | archive | serve | bundle | demo | doctor`."""

from guard.cli.app import app, main, run

__all__ = ["app", "main", "run"]

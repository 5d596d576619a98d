"""Filter steps. `registry` lists them all."""

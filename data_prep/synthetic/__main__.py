"""Command: `python -m data_prep.synthetic`, the same as `python -m data_prep.synthetic.web`."""

from data_prep.synthetic.web import define_flags, main
from diht_jax import command_line

if __name__ == "__main__":
    define_flags()
    command_line.run(main)

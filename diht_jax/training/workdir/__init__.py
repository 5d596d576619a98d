"""The work directory of a run: checkpoints, lock, resume checks, object stores."""

"""Bad input, tried by the thousand: every kind of input, damaged by a seeded random choice.

    python -m tests.fuzz                               # 2,000 cases, seed 0: about 2 minutes
    python -m tests.fuzz --cases 20000 --seed 7        # more of them
    python -m tests.fuzz --kinds tars,images           # some kinds only
    python -m tests.fuzz --only tars:17                # one case again, with its traceback

A case builds a small valid input, damages a part of it that it remembers, reads it with the code
under test, and compares with what it built. It must end in one of three ways:

    success   everything is there, byte for byte, but for the damaged part
    error     a documented error (`ValueError` or a class of it) that names file, record or key
    skip      the damaged part is passed over and counted; everything else is there

Anything else fails: another exception, a good record that is missing or changed, an error that does
not say where, more than `worker.LIMIT_SECS` for a case, more than `worker.LIMIT_BYTES` of memory,
or a process that dies. Cases run in a process of their own (`worker.py`), which `runner.py` starts
again where it died. One module per kind of input; `cases.py` holds what they share.
"""

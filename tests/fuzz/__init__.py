"""Fuzz tests: thousands of tars, tables, records, images and weights damaged by hypothesis.

    python -m tests.fuzz                               # 2,000 cases, seed 0: about 2 minutes
    python -m tests.fuzz --cases 20000 --seed 7        # more of them
    python -m tests.fuzz --kinds written --cases 1500  # files that our commands write
    python -m tests.fuzz --kinds tars,images           # some kinds only
    python -m tests.fuzz --kinds tars:cut_off          # one property of a kind

A property is a function `check_...` of `kinds/KIND.py`. It draws a small valid input, damages a
known part of it, reads it with the code under test, and compares the result with what it drew.
Every case must end in one of three ways:

    success   everything is there, byte for byte, except the damaged part
    error     a documented error (`ValueError` or a subclass) that names file, record or key
    skip      the damaged part is skipped and counted; everything else is there

Anything else fails: another exception, a good record that is missing or changed, an error that
does not name the culprit, more than `runner.LIMIT_SECS` for a case, more than
`runner.LIMIT_BYTES` of memory, or a process that dies. Hypothesis then shrinks the case and shows
what was drawn. Cases run in a separate process, which `runner.py` replaces when it dies. The same
seed gives the same cases; nothing is kept between runs.
"""

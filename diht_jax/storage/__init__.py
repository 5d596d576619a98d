"""Files, local and in object stores: open, write, copy, lock and retry.

`files` works on paths and URLs alike and is what most code needs; `stores` reads parts of files in
object stores and decides which failures pass by themselves, `locks` keeps processes apart.
No other room imports fsspec or the locks of the operating system.
"""

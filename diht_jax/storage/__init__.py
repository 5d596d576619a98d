"""File access on local disks and in object stores: reading, writing, copying, locking and retries.

Most code needs only `files`, which accepts both paths and URLs. `stores` implements ranged reads
from object stores and decides which errors are transient. `locks` implements locks between
processes. No other package imports fsspec or the locks of the operating system.
"""

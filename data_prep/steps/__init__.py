"""The steps of the filter, one file each; `registry` has them all."""

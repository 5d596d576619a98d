"""The steps of the filter; `registry` has them all."""

"""Matrix products of the caption parser by NumPy's BLAS.

`captions.load_parser` uses it. Two thirds of the time of spaCy's small model are the products of
its convolutions. thinc makes them with the BLIS that it brings along; the OpenBLAS under NumPy was
three times as fast at these sizes where it was measured (AMD EPYC with AVX-512). Rounding differs
in the last bit; the graphs of 5,000 web captions are the same.
"""

import numpy as np
from spacy.language import Language
from thinc.api import NumpyOps


class NumpyBlasOps(NumpyOps):
    """thinc's operations on CPUs, with `numpy.dot` for products of matrices."""

    def gemm(self, x, y, out=None, trans1=False, trans2=False):
        """`x @ y`, both maybe transposed, into `out` where it is given; float32 [m, k], [k, n]."""
        x = x.T if trans1 else x
        y = y.T if trans2 else y
        return np.dot(x, y, out=out)


def use_numpy_blas(nlp: Language) -> None:
    """Lets all models of a pipeline, which this changes, compute with `NumpyBlasOps`."""
    ops = NumpyBlasOps()
    for _, component in nlp.pipeline:
        model = getattr(component, "model", None)
        if model is None or not isinstance(model.ops, NumpyOps):
            continue
        for node in model.walk():
            node.ops = ops

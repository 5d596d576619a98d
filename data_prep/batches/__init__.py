"""The expensive stages as plain classes of batches: an Arrow table in, decision columns out.

Each is made once per process and then called with tables, as `ray.data.Dataset.map_batches`, NeMo
Curator and any loop over record batches do it. The filter and the labels use them as well.
"""

from data_prep.batches.captions import CaptionFilter
from data_prep.batches.teacher import Teacher
from data_prep.batches.text import TextSpotter

__all__ = ["CaptionFilter", "Teacher", "TextSpotter"]

"""The model `clipart_tiny`, and pictures to try it with; README.md is the model card."""

import importlib.resources
import pathlib

# A webdataset of 60 emoji that the model was not trained on, with their names as captions.
PICTURES = pathlib.Path(str(importlib.resources.files(__name__) / "pictures.tar"))

"""HTML pages: one Jinja template for each kind of page, rendered into one self-contained file.

`render` in `render.py` renders a template of `templates/`. Templates extend `base.html` (frame and
style) and import its macros for tables and for images with captions.
"""

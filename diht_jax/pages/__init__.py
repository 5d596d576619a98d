"""HTML pages: one Jinja template for each kind of page, rendered into one file without links.

`render` in `render.py` fills a template of `templates/`. A template extends `base.html` (frame and
style) and imports its macros: tables, pictures with captions.
"""

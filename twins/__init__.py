"""Code you can do research without reading, one topic per file; no script names, options or losses."""

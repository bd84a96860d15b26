"""What nobody has to read to do research, one subject a file; no script's name, options or losses."""

"""What nobody has to read to do research; one subject a file. Nothing here knows a script's name, options or losses."""

"""The verbs of the command line, one file each. Only options are read at import: heavy packages wait for use."""

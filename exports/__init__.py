"""Lowering a Program to engines and an artifact."""

if __name__ != "dcc.exports":
    raise ImportError("import this package as dcc.exports: a second copy of its classes must not exist")

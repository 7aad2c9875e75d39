"""Any source of labelled images → one .beton file and its manifest."""

from loaders.convert.run import convert

__all__ = ["convert"]

"""Offline HTML pages: charts as SVG, tables, sizes, one shell."""

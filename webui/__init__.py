"""Static files of the operators' pages, shipped as package data; no code."""

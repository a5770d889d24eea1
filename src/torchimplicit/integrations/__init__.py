"""Bridges to other packages, each in a module of its own that imports the package it is for."""
